// The part of the residual's gradient that the density estimate gives in closed form.
//
// Included inside of a target's namespace.

/// c_j <- w_j (c_j - mean - (a_j - least) precision), or 0 where w_j is 0 (a_j may be infinite there); returns their
/// sum.
static double residual_weights(const double* w, const double* a, int64_t n, double mean, double least, double precision,
                               double* c) {
    Vec total = {};
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec weight = load(w + j), value = weight * (load(c + j) - mean - (load(a + j) - least) * precision);
        const Vec entry = weight > Vec{} ? value : Vec{};
        store(c + j, entry);
        total += entry;
    }
    return sum(total);
}

/// J_s f - grad(lap p/p) = sum_j w_j e_j [e_j.f - a_j/sigma^2]/sigma^4 - f/sigma^2 + 2 (m - z)/sigma^4, e_j = r_j - m.
///
/// Because sum_j w_j e_j = 0, any constant may be subtracted from a_j: the least a_j, which keeps its digits.
template <class Refs>
static void residual_gradient_with(const ResidualArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const Source source = source_of(args.refs, args.shape, args.sigma2);
    const Refs refs(source, args.threads);
    each_block(B, N, Refs::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Refs> q(refs, source.set_of(b), count);
        const int64_t pitch = q.pitch, columns = q.columns;
        Buffer<double> field(count * pitch), gradient(count * pitch), total(count),
            c(std::min(count, Refs::SUBBLOCK) * columns);
        q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
        std::fill_n(field.get(), count * pitch, 0.0);
        std::fill_n(gradient.get(), count * pitch, 0.0);
        std::fill_n(total.get(), count, 0.0);
        args.field.at(b, first).load(count, D, field.get(), pitch);
        q.template visit_weights<true>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
            refs.dots(q.set, field.get() + at * pitch, rows, from, to, c.get(), columns);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t n = at + i;
                double mean = 0;
                for (int64_t d = 0; d < D; ++d) mean += field[n * pitch + d] * (q.at(q.moment, n)[d] + q.at(q.x, n)[d]);
                total[n] += residual_weights(q.w.get() + i * columns, q.a.get() + i * columns, to - from, mean,
                                             q.least[n], 1 / q.variance[n], c.get() + i * columns);
            }
            refs.moments(q.set, c.get(), rows, from, to, columns, gradient.get() + at * pitch, q.product);
        });
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < D; ++d) {
                const double shift = q.at(q.moment, n)[d], mean = shift + q.at(q.x, n)[d], variance = q.variance[n];
                double& entry = gradient[n * pitch + d];
                entry = ((entry - total[n] * mean + 2 * shift) / variance - field[n * pitch + d]) / variance;
            }
        args.gradient.at(b, first).store(count, D, gradient.get(), pitch);
    });
}
