// The residual's gradient in many dimensions for arguments in float32; see residual.h.
//
// Included inside of a target's namespace.

/// Computes queries of a block anew in float64; the arguments are those of the block.
static void repeat_residual(const ResidualArguments& args, const std::vector<int64_t>& rows) {
    const int64_t D = args.shape.D;
    const Gathered z(args.z, rows, D), field(args.field, rows, D), sigma2(args.sigma2, rows, 1), gradient(rows, D);
    const Gathered factor = args.factor ? Gathered(args.factor, rows, 1) : Gathered(rows, 1);
    const Shape shape{1, static_cast<int64_t>(rows.size()), args.shape.M, D};
    residual_gradient_with<Rows>(
        {shape, 1, z.view, field.view, args.refs, sigma2.view, args.factor ? factor.view : Array{}, gradient.view});
    gradient.place(args.gradient);
}

/// Writes the gradient of query n, or rejects the query: with S = sum_j w_j (r_j - r_head) without its last digits and
/// G = sum_j c_j (r_j - m), it is ((G + 2 factor (m - z))/sigma^2 - f)/sigma^2.
static void store_residual(const ResidualArguments& block, FloatQueries& q, const FloatCoefficients& k,
                           const Panels& mean, const Panels& sum, double factor, int64_t n) {
    FloatQueries::Query& query = q.query[n];
    if (query.rejected) return;
    const auto& s = k.sums[n];
    const double others = query.rest / (1 + query.rest);
    const auto share = static_cast<float>(others), rest = static_cast<float>(s.rest),
               total = static_cast<float>(s.total);
    const auto scale = static_cast<float>(1 / query.variance), twice = static_cast<float>(2 * factor);
    Buffer<float> gradient(block.shape.D);
    double square = 0;
    for (int64_t p = 0; p < sum.count; ++p) {
        const float *head = q.refs.row(q.set, p, query.head), *m = mean.row(p, n), *g = sum.row(p, n),
                    *f = k.v.row(p, n);
        float displacement[PANEL];
        q.head_displacement(n, p, displacement);
        for (int64_t d = 0; d < sum.inside(p); ++d) {
            const float moved = m[d] - share * head[d];
            const float value = g[d] - rest * head[d] - total * moved + twice * (moved + displacement[d]);
            const float entry = value * scale - f[d];
            square += static_cast<double>(entry) * static_cast<double>(entry);
            gradient[p * PANEL + d] = entry * scale;
        }
    }
    const double size = std::abs(s.rest) + std::abs(s.total) + std::sqrt(std::max(0.0, s.second * others)) +
                        2 * std::abs(factor) * others;
    const double error = 1.5e-7 * size * q.refs.widest(q.set) / query.variance;
    if (!(error <= 1e-6 * std::sqrt(square)))
        query.rejected = true;
    else
        write_row(block.gradient, n, block.shape.D,
                  [&](float* out) { std::copy_n(gradient.get(), block.shape.D, out); });
}

static void residual_gradient_floats(const ResidualArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const FloatRows refs = float_refs(args.refs, args.shape, args.threads);
    each_block(B, N, FloatRows::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        FloatQueries q(refs, set_of(args.refs, b), count, false);
        FloatCoefficients k(q, count);
        const Panels mean(count, D), sum(count, D);
        Buffer<double> factor(count);
        std::fill_n(factor.get(), count, 1.0);
        if (args.factor) args.factor.at(b, first).load(count, 1, factor.get(), 1);
        ResidualArguments block = args;
        for (Array* array : {&block.z, &block.field, &block.sigma2, &block.gradient}) *array = array->at(b, first);
        if (args.factor) block.factor = args.factor.at(b, first);
        block.refs = args.refs.at(b);
        q.take(Points{block.z}, block.sigma2, count);
        for (int64_t n = 0; n < count; ++n) {
            mean.clear(n);
            sum.clear(n);
            k.take(n, block.field, {}, 0, factor[n] / q.query[n].variance);
        }
        k.visit([&](int64_t from, int64_t to) {
            for (int64_t n = 0; n < count; ++n)
                if (from <= q.query[n].head && q.query[n].head < to) q.w[n * q.columns + q.query[n].head - from] = 0;
            k.set_heads(from, to, false);
            q.add_products(q.w.get(), from, to, mean);
            q.add_products(k.c.get(), from, to, sum);
        });
        for (int64_t n = 0; n < count; ++n) store_residual(block, q, k, mean, sum, factor[n], n);
        const std::vector<int64_t> rejected = q.rejected();
        if (!rejected.empty()) repeat_residual(block, rejected);
    });
}
