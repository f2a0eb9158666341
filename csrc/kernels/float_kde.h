// Kernel density estimate in many dimensions for arguments in float32; see kde.h.
//
// Included inside of a target's namespace.

/// The reference points of an array [B, M, D]; groups that share them get one set.
static FloatRows float_refs(const Array& refs, const Shape& shape, int threads) {
    return FloatRows(refs.stride[0] == 0 ? 1 : shape.B, shape.M, shape.D, threads,
                     [&](int64_t set) { return Points{refs.at(set)}; });
}
static int64_t set_of(const Array& refs, int64_t b) { return refs.stride[0] == 0 ? 0 : b; }

/// Computes queries of a block anew in float64; the arguments are those of the block.
static void repeat_kde(const KdeArguments& args, const std::vector<int64_t>& rows) {
    const int64_t D = args.shape.D;
    const Gathered z(args.z, rows, D), sigma2(args.sigma2, rows, 1), shift(rows, D), mean(rows, D),
        log_density(rows, 1), log_sum(rows, 1);
    const Shape shape{1, static_cast<int64_t>(rows.size()), args.shape.M, D};
    kde_with<Rows>({shape, 1, z.view, args.refs, sigma2.view, shift.view, mean.view, log_density.view, log_sum.view});
    log_sum.place(args.log_sum);
    shift.place(args.shift);
    mean.place(args.mean);
    log_density.place(args.log_density);
}

/// Computes the displacements of rejected queries anew in float64.
static void repeat_displacements(FloatQueries& q, const Array& refs, const std::vector<int64_t>& rows) {
    const int64_t D = q.refs.D;
    const Gathered z(rows, D), sigma2(rows, 1), shift(rows, D), mean(rows, D), log_density(rows, 1);
    for (size_t i = 0; i < rows.size(); ++i) {
        q.exact(rows[i], z.row(i));
        *sigma2.row(i) = q.query[rows[i]].variance;
    }
    const Shape shape{1, static_cast<int64_t>(rows.size()), q.refs.M, D};
    kde_with<Rows>({shape, 1, z.view, refs, sigma2.view, shift.view, mean.view, log_density.view});
    for (size_t i = 0; i < rows.size(); ++i)
        for (int64_t p = 0; p < q.sum.count; ++p)
            for (int64_t d = 0; d < q.sum.inside(p); ++d)
                q.sum.row(p, rows[i])[d] = static_cast<float>(shift.row(i)[p * PANEL + d]);
}

static void kde_floats(const KdeArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const FloatRows refs = float_refs(args.refs, args.shape, args.threads);
    const double constant = std::log(static_cast<double>(M)) + 0.5 * D * std::log(2 * PI);
    const bool moments = args.shift || args.mean;
    each_block(B, N, FloatRows::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        const int64_t set = set_of(args.refs, b);
        KdeArguments block = args;
        for (Array* array : {&block.z, &block.sigma2, &block.shift, &block.mean, &block.log_density, &block.log_sum})
            if (*array) *array = array->at(b, first);
        block.refs = args.refs.at(b);
        FloatQueries q(refs, set, count, moments);
        q.take(Points{block.z}, block.sigma2, count);
        q.sweep(moments);
        for (int64_t n = 0; n < count; ++n) {
            if (block.log_density) {
                const double log_density = q.log_sum(n) - constant - 0.5 * D * std::log(q.query[n].variance);
                block.log_density.at(0, n).store(1, 1, &log_density, 1);
            }
            if (block.log_sum) {
                const double log_sum = q.log_sum(n);
                block.log_sum.at(0, n).store(1, 1, &log_sum, 1);
            }
            if (!moments || q.query[n].rejected) continue;
            write_row(block.mean, n, D, [&](float* out) { q.mean(n, out); });
            if (!block.shift) continue;
            q.displace(n);  // which may reject it, too
            write_row(block.shift, n, D, [&](float* out) { q.sum.copy(n, out); });
        }
        const std::vector<int64_t> rejected = q.rejected();
        if (!rejected.empty()) repeat_kde(block, rejected);
    });
}
