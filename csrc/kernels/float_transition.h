// Transition weights in many dimensions for arguments in float32; see transition.h.
//
// Included inside of a target's namespace.

static FloatRows float_means(const TransitionArguments& args) {
    return FloatRows(args.shape.B, args.shape.M, args.shape.D, args.threads, [&](int64_t b) {
        return Points{args.x0.at(b), args.shift0.at(b), -std::expm1(-args.tau.number(b))};
    });
}

/// The arguments for some ends of group b, with `result` [M, columns] in float64.
static TransitionArguments repeated(const TransitionArguments& args, int64_t b, const Gathered& ends, int64_t count,
                                    const Gathered& result) {
    TransitionArguments again = args;
    again.shape = {1, count, args.shape.M, args.shape.D};
    again.threads = 1;
    for (Array* array : {&again.x0, &again.shift0, &again.sigma2, &again.tau}) *array = array->at(b);
    again.xt = ends.view;
    again.result = result.view;
    return again;
}

static void transition_weights_floats(const TransitionArguments& args) {
    const int64_t B = args.shape.B, ends = args.shape.N, starts = args.shape.M, D = args.shape.D;
    const FloatRows means = float_means(args);
    const std::vector<int64_t> every(static_cast<size_t>(starts));
    each_block(B, ends, FloatRows::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        FloatQueries q(means, b, count, false);
        const Array xt = args.xt.at(b, first);
        for (int64_t n = 0; n < count; ++n) q.set_variance(n, variance_of(args, b));
        q.take(Points{xt}, count);
        q.visit_weights([&](int64_t from, int64_t to) {
            Buffer<double> column(count);
            for (int64_t j = from; j < std::min(to, starts); ++j) {
                for (int64_t n = 0; n < count; ++n) column[n] = static_cast<double>(q.w[n * q.columns + j - from]);
                args.result.at(b, j, first).store(1, count, column.get(), count);
            }
        });
        const std::vector<int64_t> rejected = q.rejected();
        if (rejected.empty()) return;
        const auto some = static_cast<int64_t>(rejected.size());
        const Gathered again(xt, rejected, D), result(every, some);
        transition_weights_with<Rows>(repeated(args, b, again, some, result));
        for (int64_t j = 0; j < starts; ++j)
            for (int64_t i = 0; i < some; ++i)
                args.result.at(b, j, first + rejected[static_cast<size_t>(i)])
                    .store(1, 1, result.row(static_cast<size_t>(j)) + i, 1);
    });
}

static void transition_average_floats(const TransitionArguments& args) {
    const int64_t B = args.shape.B, ends = args.shape.N, starts = args.shape.M, D = args.shape.D;
    const int64_t V = args.values_count;
    const FloatRows means = float_means(args);
    const std::vector<int64_t> every(static_cast<size_t>(starts));
    const Partial partial(B, ends, FloatRows::BLOCK, args.threads, starts * V);
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* sums) {
        const int64_t most = std::min(share, FloatRows::BLOCK);
        FloatQueries q(means, b, most, false);
        FloatProduct outer(means.tile);
        const Panels values(most, V), average(means.padded, V);
        Buffer<float> zero(V);
        std::fill_n(zero.get(), V, 0.0f);
        for (int64_t n = 0; n < most; ++n) q.set_variance(n, variance_of(args, b));
        for (int64_t j = 0; j < means.padded; ++j) average.clear(j);
        for (int64_t first = begin; first < begin + share; first += most) {
            const int64_t count = std::min(most, begin + share - first);
            const Array xt = args.xt.at(b, first);
            const Points given{args.values.at(b, first)};
            q.take(Points{xt}, count);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t p = 0; p < values.count; ++p) values.center(given, n, p, zero.get(), n);
            q.visit_weights([&](int64_t from, int64_t to) {
                outer.add(q.w.get(), 1, q.columns, to - from, count, values, 0, average, from);
            });
            const std::vector<int64_t> rejected = q.rejected();
            if (rejected.empty()) continue;
            const auto some = static_cast<int64_t>(rejected.size());
            const Gathered again(xt, rejected, D), again_values(given.base, rejected, V), result(every, V);
            TransitionArguments once = repeated(args, b, again, some, result);
            once.values = again_values.view;
            transition_average_with<Rows>(once);
            for (int64_t i = 0; i < starts * V; ++i) sums[i] += result.row(0)[i];
        }
        for (int64_t j = 0; j < starts; ++j)
            for (int64_t p = 0; p < average.count; ++p)
                for (int64_t d = 0; d < average.inside(p); ++d)
                    sums[j * V + p * PANEL + d] += static_cast<double>(average.row(p, j)[d]);
    });
    partial.collect([&](int64_t b, double* sums) { args.result.at(b).store(starts, V, sums, V); });
}
