// Averages under a kernel in many dimensions for arguments in float32; see kernel_average.h.
//
// Included inside of a target's namespace.

/// The arguments of group b alone.
static AverageArguments group_of(const AverageArguments& args, int64_t b) {
    AverageArguments group = args;
    group.shape.B = 1;
    group.threads = 1;
    for (Array* array : {&group.z, &group.refs, &group.sigma2, &group.values, &group.log_weights, &group.shift,
                         &group.average, &group.log_sum})
        if (*array) *array = array->at(b);
    return group;
}

/// Computes queries of one group, listed by their places, anew in float64.
static void repeat_average(const AverageArguments& args, const std::vector<int64_t>& rows) {
    const int64_t D = args.shape.D;
    const Gathered z(args.z, rows, D), sigma2(rows, 1), shift(rows, D), average(rows, args.width), log_sum(rows, 1);
    AverageArguments again = args;
    again.shape.N = static_cast<int64_t>(rows.size());
    again.z = z.view;
    if (!args.per_reference) {
        for (size_t i = 0; i < rows.size(); ++i) *sigma2.row(i) = args.sigma2.number(0, rows[i]);
        again.sigma2 = sigma2.view;
    }
    if (args.shift) again.shift = shift.view;
    again.average = average.view;
    again.log_sum = log_sum.view;
    again.indices = rows.data();
    kernel_average_with<Rows>(again);
    shift.place(args.shift);
    average.place(args.average);
    log_sum.place(args.log_sum);
}

/// The reference points of the first group, for `FloatRows`.
static auto points_of(const AverageArguments& args) {
    return [refs = args.refs](int64_t) { return Points{refs}; };
}

/// Averages of one group against its reference points; each block of queries is a task.
static void average_group(const AverageArguments& args, const FloatRows& refs, const FloatWeighting& weighting) {
    const int64_t N = args.shape.N, D = args.shape.D, V = args.width;
    each_block(1, N, FloatRows::BLOCK, args.threads, [&](int64_t, int64_t first, int64_t count) {
        FloatQueries q(refs, 0, count, args.width > 0, &weighting);
        q.take(Points{args.z.at(0, first)}, variances_of(args, 0, first), count, first, args.indices);
        q.sweep(args.width > 0);
        for (int64_t n = 0; n < count; ++n) {
            if (q.query[n].rejected) continue;
            const double log_sum = q.log_sum(n);
            args.log_sum.at(0, first + n).store(1, 1, &log_sum, 1);
            if (args.values) {
                write_row(args.average, first + n, V, [&](float* out) { q.average(n, out); });
                continue;
            }
            write_row(args.average, first + n, D, [&](float* out) { q.mean(n, out); });
            q.displace(n);  // which may reject it, too
            write_row(args.shift, first + n, D, [&](float* out) { q.sum.copy(n, out); });
        }
        std::vector<int64_t> rejected = q.rejected();
        for (int64_t& n : rejected) n += first;
        if (!rejected.empty()) repeat_average(args, rejected);
    });
}

static void kernel_average_floats(const AverageArguments& args) {
    if (args.is_plain()) return kde_floats(plain_of(args));
    const Shape& shape = args.shape;
    if (args.values && !(args.values.largest(shape.B, shape.M, args.width) <= LARGEST))
        return kernel_average_with<Rows>(args);
    const bool one_set = args.refs.stride[0] == 0, one_weighting = are_shared(args);
    std::optional<FloatRows> refs;
    std::optional<FloatWeighting> weighting;
    if (one_set) refs.emplace(1, shape.M, shape.D, args.threads, points_of(args));
    if (one_weighting) weighting.emplace(args, 0, refs->padded);
    // Many groups are tasks of their own: a small one stays in the cache from its packing to its results.
    const bool by_group = shape.B >= args.threads;
    parallel_for(shape.B, by_group ? args.threads : 1, [&](int64_t b) {
        AverageArguments group = group_of(args, b);
        if (!by_group) group.threads = args.threads;
        std::optional<FloatRows> own_refs;
        std::optional<FloatWeighting> own_weighting;
        if (!one_set) own_refs.emplace(1, shape.M, shape.D, group.threads, points_of(group));
        const FloatRows& against = one_set ? *refs : *own_refs;
        if (!one_weighting) own_weighting.emplace(group, 0, against.padded);
        average_group(group, against, one_weighting ? *weighting : *own_weighting);
    });
}

static void kernel_average_backward_floats(const AverageBackwardArguments& args) {
    if (args.is_plain()) return kde_backward_floats(plain_of(args));
    kernel_average_backward_with<Rows>(args);
}
