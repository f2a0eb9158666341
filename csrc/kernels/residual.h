// The part of the residual's gradient that the density estimate gives in closed form.
//
// Included inside of a target's namespace.

/// c_j <- w_j (c_j - (a_j - least) precision), or 0 where w_j is 0 (a_j may be infinite there); returns their sum.
template <class Number>
static double residual_weights(const Number* w, const Number* a, int64_t n, double least, double precision, Number* c) {
    using Vector = decltype(load(w));
    const Vector lowest = broadcast(static_cast<Number>(least)), times = broadcast(static_cast<Number>(precision));
    Vector total = {};
    for (int64_t j = 0; j < n; j += sizeof(Vector) / sizeof(Number)) {
        const Vector weight = load(w + j), value = weight * (load(c + j) - (load(a + j) - lowest) * times);
        const Vector entry = weight > Vector{} ? value : Vector{};
        store(c + j, entry);
        total += entry;
    }
    return sum(total);
}

/// J_s f - k grad(lap p/p) = sum_j w_j e_j [e_j.f - k a_j/sigma^2]/sigma^4 - f/sigma^2 + 2k (m - z)/sigma^4 with
/// e_j = r_j - m and the factor k, 1 by default.
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
        Buffer<double> field(count * pitch), gradient(count * pitch), total(count), mean(count), factor(count);
        Buffer<typename Refs::Number> c(std::min(count, Refs::SUBBLOCK) * columns);
        q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
        std::fill_n(field.get(), count * pitch, 0.0);
        std::fill_n(gradient.get(), count * pitch, 0.0);
        std::fill_n(total.get(), count, 0.0);
        args.field.at(b, first).load(count, D, field.get(), pitch);
        std::fill_n(factor.get(), count, 1.0);
        if (args.factor) args.factor.at(b, first).load(count, 1, factor.get(), 1);
        q.template visit_weights<true>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
            for (int64_t n = at; n < at + rows; ++n) mean[n] = q.along_mean(field.get() + n * pitch, n);
            q.dots(field.get() + at * pitch, at, rows, from, to, mean.get() + at, c.get());
            for (int64_t i = 0; i < rows; ++i)
                total[at + i] += residual_weights(q.w.get() + i * columns, q.a.get() + i * columns, to - from,
                                                  q.least[at + i] - q.base, factor[at + i] / q.variance[at + i],
                                                  c.get() + i * columns);
            q.moments(c.get(), at, rows, from, to, gradient.get() + at * pitch);
        });
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < D; ++d) {
                const double shift = q.at(q.moment, n)[d], variance = q.variance[n];
                const double mean = shift + refs.local(q.at(q.x, n)[d]);
                double& entry = gradient[n * pitch + d];
                entry =
                    ((entry - total[n] * mean + 2 * factor[n] * shift) / variance - field[n * pitch + d]) / variance;
            }
        args.gradient.at(b, first).store(count, D, gradient.get(), pitch);
    });
}
