// Kernel density estimate (Eq. 7): displacement to the weighted mean, mean, log-density, and their derivatives.
//
// Included inside of a target's namespace.

template <class Refs>
static void kde_with(const KdeArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const Source source = source_of(args.refs, args.shape, args.sigma2);
    const Refs refs(source, args.threads);
    // log p = log sum_j e^{-a_j/2 sigma^2} - log M - D/2 log 2 pi sigma^2
    const double constant = std::log(static_cast<double>(M)) + 0.5 * D * std::log(2 * PI);
    each_block(B, N, Refs::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Refs> q(refs, source.set_of(b), count);
        q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
        q.sweep();
        args.shift.at(b, first).store(count, D, q.moment.get(), q.pitch);
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < D; ++d) q.at(q.moment, n)[d] += q.at(q.x, n)[d];
        q.decenter(q.moment.get());
        args.mean.at(b, first).store(count, D, q.moment.get(), q.pitch);
        for (int64_t n = 0; n < count; ++n) {
            const double log_density =
                std::log(q.total[n]) - q.least[n] * q.scale[n] - constant - 0.5 * D * std::log(q.variance[n]);
            args.log_density.at(b, first + n).store(1, 1, &log_density, 1);
        }
    });
}

/// Cotangents of z, refs and sigma2 from those of shift, mean and log-density.
///
/// With v the cotangent of m and g that of log p, the logits L_j = -|z - r_j|^2/2 sigma^2 have the cotangent
/// c_j = w_j ((r_j - m).v + g); the rest is the chain rule through L_j, and through r_j in m.
template <class Refs>
static void kde_backward_with(const KdeBackwardArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const Source source = source_of(args.refs, args.shape, args.sigma2);
    const Refs refs(source, args.threads);
    const int64_t outer_size = refs.outer_size(D);
    const Partial partial(B, N, Refs::BLOCK, args.threads, outer_size + refs.padded);
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* sums) {
        double *g_refs = sums, *scaled_sums = sums + outer_size;
        const int64_t most = std::min(share, Refs::BLOCK);
        Queries<Refs> q(refs, source.set_of(b), most);
        const int64_t pitch = q.pitch, columns = q.columns;
        Buffer<double> v(most * pitch), g_shift(most * pitch), g_z(most * pitch), g_log(most), g_sigma2(most),
            along(most), c(std::min(most, Refs::SUBBLOCK) * columns);
        for (int64_t first = begin; first < begin + share; first += most) {
            const int64_t count = std::min(most, begin + share - first);
            q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
            std::fill_n(v.get(), count * pitch, 0.0);
            std::fill_n(g_z.get(), count * pitch, 0.0);
            args.g_mean.at(b, first).load(count, D, v.get(), pitch);
            args.g_shift.at(b, first).load(count, D, g_shift.get(), pitch);
            for (int64_t n = 0; n < count; ++n) {
                for (int64_t d = 0; d < D; ++d) v[n * pitch + d] += g_shift[n * pitch + d];
                g_log[n] = args.g_log_density.number(b, first + n);
                g_sigma2[n] = -g_log[n] * D / q.variance[n] / 2;
                along[n] = 0;
            }
            q.template visit_weights<true>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
                refs.outer(q.w.get(), rows, from, to, columns, v.get() + at * pitch, D, pitch, g_refs, q.product);
                refs.dots(q.set, v.get() + at * pitch, rows, from, to, c.get(), columns);
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t n = at + i;
                    double mean = 0, sum = 0, square = 0;
                    for (int64_t d = 0; d < D; ++d) mean += v[n * pitch + d] * (q.at(q.moment, n)[d] + q.at(q.x, n)[d]);
                    const double *w = q.w.get() + i * columns, *a = q.a.get() + i * columns;
                    for (int64_t j = 0; j < to - from; ++j) {
                        double& entry = c[i * columns + j];
                        entry = w[j] * (entry - mean + g_log[n]) / q.variance[n];
                        sum += entry;
                        square += w[j] == 0 ? 0 : entry * a[j];
                        scaled_sums[from + j] += entry;
                    }
                    along[n] += sum;
                    g_sigma2[n] += square / q.variance[n] / 2;
                }
                refs.moments(q.set, c.get(), rows, from, to, columns, g_z.get() + at * pitch, q.product);
                refs.outer(c.get(), rows, from, to, columns, q.at(q.x, at), D, pitch, g_refs, q.product);
            });
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d)
                    g_z[n * pitch + d] -= along[n] * q.at(q.x, n)[d] + g_shift[n * pitch + d];
            args.g_z.at(b, first).store(count, D, g_z.get(), pitch);
            for (int64_t n = 0; n < count; ++n) args.g_sigma2.at(b, first + n).store(1, 1, &g_sigma2[n], 1);
        }
    });
    partial.collect([&](int64_t b, double* sums) {
        Buffer<double> row(D), ref(D);
        for (int64_t place = 0; place < M; ++place) {
            refs.collect(sums, place, D, row.get());
            refs.coordinates(source.set_of(b), place, ref.get());
            for (int64_t d = 0; d < D; ++d) row[d] -= sums[outer_size + place] * ref[d];
            args.g_refs.at(b, refs.source_index(source.set_of(b), place)).store(1, D, row.get(), D);
        }
    });
}
