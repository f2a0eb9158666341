// Exponential Langevin chain in many dimensions for arguments in float32; see langevin.h.
//
// Included inside of a target's namespace. Its state is in float32, relative to the origin of the reference points.

/// Adds gain times standard normal numbers to coordinates of row n of a block in `to`: those of `add_noise`.
static void add_noise(const LangevinArguments& args, uint64_t stream, int64_t step, int64_t noise_step, int64_t b,
                      int64_t first, int64_t count, double gain, const Panels& to) {
    const int64_t N = args.shape.N, D = args.shape.D;
    Buffer<double> normal(D);
    for (int64_t n = 0; n < count; ++n) {
        if (args.noise.empty())
            normals(args.seed, stream, step, (b * N + first + n) * D, D, normal.get());
        else
            args.noise[static_cast<size_t>(noise_step)].at(b, first + n).load(1, D, normal.get(), D);
        for (int64_t p = 0; p < to.count; ++p)
            for (int64_t d = 0; d < to.inside(p); ++d)
                to.row(p, n)[d] += static_cast<float>(gain * normal[p * PANEL + d]);
    }
}

/// Displacements m - x of all queries, in `sum`.
static void find_displacements(FloatQueries& q, const Array& refs) {
    q.sweep(true);
    for (int64_t n = 0; n < q.rows; ++n) q.displace(n);
    const std::vector<int64_t> rejected = q.rejected();
    if (!rejected.empty()) repeat_displacements(q, refs, rejected);
}

static void store_rows(const Array& to, int64_t count, const Panels& rows) {
    for (int64_t n = 0; n < count; ++n) write_row(to, n, rows.D, [&](float* out) { rows.copy(n, out); });
}

/// Adds noise to points as given, in float64, and stores the result.
static void store_start(const LangevinArguments& args, int64_t b, int64_t first, int64_t count, double sigma) {
    const int64_t D = args.shape.D;
    Buffer<double> rows(count * D);
    args.x.at(b, first).load(count, D, rows.get(), D);
    add_noise(args, START, 0, 0, b, first, count, sigma, rows.get(), D);
    args.x0.at(b, first).store(count, D, rows.get(), D);
}

static void langevin_floats(const LangevinArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const bool start = static_cast<bool>(args.x0);
    const FloatRows refs = float_refs(args.refs, args.shape, args.threads);
    each_block(B, N, FloatRows::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        const double variance = args.sigma2.number(b), h = args.tau.number(b) / static_cast<double>(args.steps);
        const double pull = -std::expm1(-h), diffusion = std::sqrt(-variance * std::expm1(-2 * h));
        const Array group = args.refs.at(b);
        FloatQueries q(refs, set_of(args.refs, b), count, true);
        for (int64_t n = 0; n < count; ++n) q.set_variance(n, variance);
        if (start) store_start(args, b, first, count, std::sqrt(variance));
        q.take(Points{(start ? args.x0 : args.x).at(b, first)}, count);
        for (int64_t k = 0; k < args.steps; ++k) {
            if (k > 0) q.moved();
            find_displacements(q, group);
            if (k == 0 && args.shift0) store_rows(args.shift0.at(b, first), count, q.sum);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t p = 0; p < q.x.count; ++p) {
                    float *x = q.x.row(p, n), *shift = q.sum.row(p, n);
                    for (int64_t d = 0; d < q.x.inside(p); ++d) x[d] += static_cast<float>(pull) * shift[d];
                }
            add_noise(args, CHAIN, k, k + start, b, first, count, diffusion, q.x);
        }
        q.moved();
        Buffer<double> row(D);
        for (int64_t n = 0; n < count; ++n) {
            q.exact(n, row.get());
            args.xt.at(b, first + n).store(1, D, row.get(), D);
        }
        if (!args.shift_t) return;
        q.take(Points{args.xt.at(b, first)}, count);
        find_displacements(q, group);
        store_rows(args.shift_t.at(b, first), count, q.sum);
    });
}
