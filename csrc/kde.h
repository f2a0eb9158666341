// Kernel density estimate (Eq. 7), its derivatives, and the residual's closed-form gradient.
//
// Included inside of a target's namespace.

/// The centres given by an array [B, M, D]; one set serves all groups if they share it.
static Source source_of(const Array& refs, int64_t groups, int64_t count, int64_t dimensions) {
    return {groups, count, dimensions, [refs, count](int64_t b, int64_t first, int64_t last, double* out, int64_t pitch) {
                refs.at(b, 0, first).load(count, last - first, out, pitch);
            }};
}

/// Largest entry of row b of variances [B, N].
static std::function<double(int64_t)> widest_of(const Array& sigma2, int64_t N) {
    return [sigma2, N](int64_t b) {
        double most = 0;
        for (int64_t n = 0; n < N; ++n) most = std::max(most, sigma2.number(b, n));
        return most;
    };
}

/// Calls run(b, first, count) for blocks of at most `block` of the N queries of each group.
template <class F>
static void each_block(int64_t groups, int64_t N, int64_t block, int threads, F run) {
    // Smaller blocks where there would be less than one a thread.
    block = std::min(block, std::max<int64_t>(round_up((groups * N + threads - 1) / threads, HEIGHT), HEIGHT));
    const int64_t blocks = (N + block - 1) / block;
    parallel_for(groups * blocks, threads, [&](int64_t task) {
        const int64_t first = task % blocks * block;
        run(task / blocks, first, std::min(block, N - first));
    });
}

/// Adds `count` rows of D coordinates of a group's origin.
template <class Centres>
static void add_origin(const Centres& centres, int64_t b, int64_t count, double* rows, int64_t pitch) {
    for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < centres.D; ++d) rows[n * pitch + d] += centres.origin(b)[d];
}

template <class Centres>
static void kde_with(const KdeArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const Centres centres(source_of(args.refs, B, M, D), widest_of(args.sigma2, N), args.threads);
    each_block(B, N, Centres::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Centres> q(centres, b, count);
        q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
        q.sweep();
        args.shift.at(b, first).store(count, D, q.moment.get(), q.pitch);
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < D; ++d) q.at(q.moment, n)[d] += q.at(q.x, n)[d];
        add_origin(centres, b, count, q.moment.get(), q.pitch);
        args.mean.at(b, first).store(count, D, q.moment.get(), q.pitch);
        for (int64_t n = 0; n < count; ++n) {
            const double log_density = std::log(q.total[n]) - q.least[n] * q.scale[n] - std::log(double(M)) -
                                       0.5 * D * std::log(2 * PI * q.variance[n]);
            args.log_density.at(b, first + n).store(1, 1, &log_density, 1);
        }
    });
}

/// Sums over the queries of a group that its threads make each for a part of them, added in the order of the parts.
class Partial {
public:
    Partial(int64_t groups, int64_t N, int64_t block, int threads, int64_t size)
        : groups_(groups), parts_(groups >= threads ? 1 : std::min<int64_t>(threads, (N + block - 1) / block)),
          share_(round_up((N + parts_ - 1) / parts_, block)), N_(N), threads_(threads), size_(size),
          sums_(groups * parts_ * size) {}

    /// run(b, first, count, sum) adds the queries [first, first + count) of group b to `sum`, which starts at 0.
    template <class F>
    void add(F run) const {
        parallel_for(groups_ * parts_, threads_, [&](int64_t task) {
            double* sum = sums_.get() + task * size_;
            std::fill_n(sum, size_, 0.0);
            const int64_t first = task % parts_ * share_;
            if (first < N_) run(task / parts_, first, std::min(share_, N_ - first), sum);
        });
    }

    /// run(b, sum) takes the whole sum of group b.
    template <class F>
    void collect(F run) const {
        parallel_for(groups_, threads_, [&](int64_t b) {
            double* sum = sums_.get() + b * parts_ * size_;
            for (int64_t part = 1; part < parts_; ++part)
                for (int64_t i = 0; i < size_; ++i) sum[i] += sum[part * size_ + i];
            run(b, sum);
        });
    }

private:
    int64_t groups_, parts_, share_, N_;
    int threads_;
    int64_t size_;
    Buffer<double> sums_;
};

/// Cotangents of z, refs and sigma2 from those of shift, mean and log-density.
///
/// With v the cotangent of m and g that of log p, the logits L_j = -|z - r_j|^2/2 sigma^2 have the cotangent
/// c_j = w_j ((r_j - m).v + g); the rest is the chain rule through L_j, and through r_j in m.
template <class Centres>
static void kde_backward_with(const KdeBackwardArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const Centres centres(source_of(args.refs, B, M, D), widest_of(args.sigma2, N), args.threads);
    const int64_t outer_size = centres.outer_size(D);
    const Partial partial(B, N, Centres::BLOCK, args.threads, outer_size + centres.padded);
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* sums) {
        double *g_refs = sums, *scaled_sums = sums + outer_size;
        const int64_t most = std::min(share, Centres::BLOCK);
        Queries<Centres> q(centres, b, most);
        const int64_t pitch = q.pitch, columns = q.columns;
        Buffer<double> v(most * pitch), g_shift(most * pitch), g_z(most * pitch), g_log(most), g_sigma2(most), along(most),
            c(std::min(most, Centres::SUBBLOCK) * columns);
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
                centres.outer(q.w.get(), rows, from, to, columns, v.get() + at * pitch, D, pitch, g_refs, q.product);
                centres.dots(b, v.get() + at * pitch, rows, from, to, c.get(), columns);
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t n = at + i;
                    double mean = 0, sum = 0, square = 0;
                    for (int64_t d = 0; d < D; ++d)
                        mean += v[n * pitch + d] * (q.at(q.moment, n)[d] + q.at(q.x, n)[d]);
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
                centres.moments(b, c.get(), rows, from, to, columns, g_z.get() + at * pitch, q.product);
                centres.outer(c.get(), rows, from, to, columns, q.at(q.x, at), D, pitch, g_refs, q.product);
            });
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d)
                    g_z[n * pitch + d] -= along[n] * q.at(q.x, n)[d] + g_shift[n * pitch + d];
            args.g_z.at(b, first).store(count, D, g_z.get(), pitch);
            for (int64_t n = 0; n < count; ++n) args.g_sigma2.at(b, first + n).store(1, 1, &g_sigma2[n], 1);
        }
    });
    partial.collect([&](int64_t b, double* sums) {
        Buffer<double> row(D), centre(D);
        for (int64_t place = 0; place < M; ++place) {
            centres.collect(sums, place, D, row.get());
            centres.coordinates(b, place, centre.get());
            for (int64_t d = 0; d < D; ++d) row[d] -= sums[outer_size + place] * centre[d];
            args.g_refs.at(b, centres.source_index(b, place)).store(1, D, row.get(), D);
        }
    });
}

/// J_s f - grad(lap p/p): sum_j w_j e_j [e_j.f - a_j/sigma^2]/sigma^4 - f/sigma^2 + 2 (m - z)/sigma^4 with e_j = r_j - m.
///
/// Because sum_j w_j e_j = 0, a_j may be counted from any constant: from the least, which keeps its digits.
template <class Centres>
static void residual_gradient_with(const ResidualArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const Centres centres(source_of(args.refs, B, M, D), widest_of(args.sigma2, N), args.threads);
    each_block(B, N, Centres::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Centres> q(centres, b, count);
        const int64_t pitch = q.pitch, columns = q.columns;
        Buffer<double> field(count * pitch), gradient(count * pitch), total(count),
            c(std::min(count, Centres::SUBBLOCK) * columns);
        q.take(args.z.at(b, first), args.sigma2.at(b, first), count);
        std::fill_n(field.get(), count * pitch, 0.0);
        std::fill_n(gradient.get(), count * pitch, 0.0);
        std::fill_n(total.get(), count, 0.0);
        args.field.at(b, first).load(count, D, field.get(), pitch);
        q.template visit_weights<true>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
            centres.dots(b, field.get() + at * pitch, rows, from, to, c.get(), columns);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t n = at + i;
                double mean = 0;
                for (int64_t d = 0; d < D; ++d) mean += field[n * pitch + d] * (q.at(q.moment, n)[d] + q.at(q.x, n)[d]);
                const double *w = q.w.get() + i * columns, *a = q.a.get() + i * columns;
                double sum = 0;
                for (int64_t j = 0; j < to - from; ++j) {
                    double& entry = c[i * columns + j];
                    entry = w[j] == 0 ? 0 : w[j] * (entry - mean - (a[j] - q.least[n]) / q.variance[n]);
                    sum += entry;
                }
                total[n] += sum;
            }
            centres.moments(b, c.get(), rows, from, to, columns, gradient.get() + at * pitch, q.product);
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
