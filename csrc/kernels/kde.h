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
        q.sweep(args.shift || args.mean);
        if (args.shift) args.shift.at(b, first).store(count, D, q.moment.get(), q.pitch);
        if (args.mean) {
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d) q.at(q.moment, n)[d] += q.at(q.x, n)[d];
            q.decenter(q.moment.get());
            args.mean.at(b, first).store(count, D, q.moment.get(), q.pitch);
        }
        for (int64_t n = 0; args.log_density && n < count; ++n) {
            const double log_density =
                std::log(q.total[n]) - q.least[n] * q.scale[n] - constant - 0.5 * D * std::log(q.variance[n]);
            args.log_density.at(b, first + n).store(1, 1, &log_density, 1);
        }
        for (int64_t n = 0; args.log_sum && n < count; ++n) {
            const double log_sum = std::log(q.total[n]) - q.least[n] * q.scale[n];
            args.log_sum.at(b, first + n).store(1, 1, &log_sum, 1);
        }
    });
}

/// c_j <- w_j (c_j + g)/variance, added to sums_j; returns their sum, and that of c_j a_j.
static std::pair<double, double> cotangents_of_logits(const double* w, const double* a, int64_t n, double g,
                                                      double variance, double* c, double* sums) {
    double sum = 0, square = 0;
    for (int64_t j = 0; j < n; ++j) {
        c[j] = w[j] * (c[j] + g) / variance;
        sum += c[j];
        square += w[j] == 0 ? 0 : c[j] * a[j];
        sums[j] += c[j];
    }
    return {sum, square};
}
static std::pair<double, double> cotangents_of_logits(const float* w, const float* a, int64_t n, double g,
                                                      double variance, float* c, double* sums) {
    const Floats add = broadcast(static_cast<float>(g)), times = broadcast(static_cast<float>(1 / variance));
    Floats sum_of = {}, square = {};
    for (int64_t j = 0; j < n; j += FLOATS) {
        const Floats weight = load(w + j), value = weight * (load(c + j) + add) * times;
        const Floats entry = weight > Floats{} ? value : Floats{};
        store(c + j, entry);
        sum_of += entry;
        square += weight > Floats{} ? entry * load(a + j) : Floats{};
    }
    for (int64_t j = 0; j < n; j += LANES) store(sums + j, load(sums + j) + widen(c + j));
    return {sum(sum_of), sum(square)};
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
            along(most), mean(most);
        Buffer<typename Refs::Number> c(std::min(most, Refs::SUBBLOCK) * columns);
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
                g_sigma2[n] = args.normalized ? -g_log[n] * D / q.variance[n] / 2 : 0;
                along[n] = 0;
            }
            q.template visit_weights<true>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
                for (int64_t n = at; n < at + rows; ++n) mean[n] = q.along_mean(v.get() + n * pitch, n);
                q.outer(q.w.get(), rows, from, to, v.get() + at * pitch, D, pitch, g_refs);
                q.dots(v.get() + at * pitch, at, rows, from, to, mean.get() + at, c.get());
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t n = at + i;
                    const auto [sum, square] =
                        cotangents_of_logits(q.w.get() + i * columns, q.a.get() + i * columns, to - from, g_log[n],
                                             q.variance[n], c.get() + i * columns, scaled_sums + from);
                    along[n] += sum;
                    g_sigma2[n] += (square + q.base * sum) / q.variance[n] / 2;
                }
                q.moments(c.get(), at, rows, from, to, g_z.get() + at * pitch);
                q.outer(c.get(), rows, from, to, q.at(q.x, at), D, pitch, g_refs);
            });
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d)
                    g_z[n * pitch + d] -= along[n] * refs.local(q.at(q.x, n)[d]) + g_shift[n * pitch + d];
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
