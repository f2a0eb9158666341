// Exponential Langevin chain (Eq. 8): x <- x + (1 - e^{-h}) (m(x) - x) + sigma sqrt(1 - e^{-2h}) xi, K times.
//
// Included inside of a target's namespace. A block of queries runs its whole chain before the next block begins, so its
// state never leaves the cache, and its noise is made where it is used.

/// Adds gain times standard normal numbers to rows of D numbers: entry `noise_step` of the noise, or step `step` of the
/// seed.
static void add_noise(const LangevinArguments& args, uint64_t stream, int64_t step, int64_t noise_step, int64_t b,
                      int64_t first, int64_t count, double gain, double* rows, int64_t pitch) {
    const int64_t N = args.shape.N, D = args.shape.D;
    const int64_t at_once = std::max<int64_t>(1, 4096 / D);
    Buffer<double> normal(std::min(at_once, count) * D);
    for (int64_t n = 0; n < count; n += at_once) {
        const int64_t here = std::min(at_once, count - n);
        if (args.noise.empty())
            normals(args.seed, stream, step, ((b * N) + first + n) * D, here * D, normal.get());
        else
            args.noise[noise_step].at(b, first + n).load(here, D, normal.get(), D);
        for (int64_t i = 0; i < here; ++i)
            for (int64_t d = 0; d < D; ++d) rows[(n + i) * pitch + d] += gain * normal[i * D + d];
    }
}

template <class Refs>
static void langevin_with(const LangevinArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const bool start = static_cast<bool>(args.x0);
    const auto variance_of = [&](int64_t b) { return args.sigma2.number(b); };
    const Source source = source_of(args.refs, args.shape, args.sigma2);
    const Refs refs(source, args.threads);
    each_block(B, N, Refs::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        const double variance = variance_of(b), h = args.tau.number(b) / args.steps;
        const double pull = -std::expm1(-h), diffusion = std::sqrt(-variance * std::expm1(-2 * h));
        Queries<Refs> q(refs, source.set_of(b), count);
        double* x = q.x.get();
        const int64_t pitch = q.pitch;
        q.rows = count;
        for (int64_t n = 0; n < count; ++n) q.set_variance(n, variance);
        args.x.at(b, first).load(count, D, x, pitch);
        if (start) {
            add_noise(args, START, 0, 0, b, first, count, std::sqrt(variance), x, pitch);
            args.x0.at(b, first).store(count, D, x, pitch);
            args.x0.at(b, first).load(count, D, x, pitch);  // the chain starts from the rounded x0
        }
        q.center();
        for (int64_t k = 0; k < args.steps; ++k) {
            q.sweep();
            if (k == 0 && args.shift0) args.shift0.at(b, first).store(count, D, q.moment.get(), pitch);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d) x[n * pitch + d] += pull * q.at(q.moment, n)[d];
            add_noise(args, CHAIN, k, k + start, b, first, count, diffusion, x, pitch);
        }
        q.decenter(x);
        args.xt.at(b, first).store(count, D, x, pitch);
        if (args.shift_t) {
            args.xt.at(b, first).load(count, D, x, pitch);
            q.center();
            q.sweep();
            args.shift_t.at(b, first).store(count, D, q.moment.get(), pitch);
        }
    });
}
