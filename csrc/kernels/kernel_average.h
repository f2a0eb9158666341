// Averages of values under a kernel with weights of the reference points, the log-sum, and their derivatives.
//
// Included inside of a target's namespace.

static Source source_of(const AverageArguments& args) {
    return source_of(args.refs, args.shape, args.sigma2, args.per_reference ? args.shape.M : args.shape.N,
                     args.laplace);
}
/// The arguments of the density estimate that plain averages are.
static KdeArguments plain_of(const AverageArguments& args) {
    return {args.shape, args.threads, args.z, args.refs, args.sigma2, args.shift, args.average, {}, args.log_sum};
}
static KdeBackwardArguments plain_of(const AverageBackwardArguments& args) {
    return {args.shape, args.threads, args.g_shift, args.g_average, args.g_log_sum, args.z,
            args.refs,  args.sigma2,  args.g_z,     args.g_refs,    args.g_sigma2,  false};
}
/// The variances of the queries of a block, or none.
static Array variances_of(const AverageArguments& args, int64_t b, int64_t first) {
    return args.per_reference ? Array{} : args.sigma2.at(b, first);
}

template <class Refs>
static void kernel_average_with(const AverageArguments& args) {
    if (args.is_plain()) return kde_with<Refs>(plain_of(args));
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const Source source = source_of(args);
    const Weighted<Refs> refs(args, source);
    each_block(B, N, Refs::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Weighted<Refs>> q(refs, source.set_of(b), count, b);
        q.take(args.z.at(b, first), variances_of(args, b, first), count, first, args.indices);
        q.sweep(args.width > 0);
        if (!args.values) {
            args.shift.at(b, first).store(count, D, q.moment.get(), q.pitch);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t d = 0; d < D; ++d) q.at(q.moment, n)[d] += q.at(q.x, n)[d];
            q.decenter(q.moment.get());
        }
        args.average.at(b, first).store(count, args.width, q.moment.get(), q.moment_pitch);
        for (int64_t n = 0; n < count; ++n) {
            const double log_sum =
                q.total[n] == 0 ? -INFINITY : std::log(q.total[n]) - q.least[n] * q.scale[n] + refs.top(b);
            args.log_sum.at(b, first + n).store(1, 1, &log_sum, 1);
        }
    });
}

/// Sums of the cotangents of logits of one query, c_j: of e_j = c_j times the pull -2 dlogit/da, and of c_j exponent_j.
struct LogitSums {
    double pull = 0, exponent = 0;
};

/// The cotangents of what reference points have, summed over the queries of a part: rows of `Partial`.
template <class Refs>
struct AverageSums {
    AverageSums(const Weighted<Refs>& refs, int64_t D, double* sums)
        : refs(sums),
          values(sums + refs.outer_size(D)),
          pull(values + refs.outer_of_values()),
          logit(pull + refs.padded),
          slope(logit + refs.padded) {}
    static int64_t size(const Weighted<Refs>& refs, int64_t D) {
        return refs.outer_size(D) + refs.outer_of_values() + 3 * refs.padded;
    }
    double *refs, *values, *pull, *logit, *slope;
};

/// Turns p_j = (v_j - average).v into the cotangents c_j = w_j (p_j + g), kept in `sums`, and writes e_j over p and
/// c_j exponent_j over a, the squared distances.
template <class Refs>
static LogitSums cotangents_of_logits(const Weighted<Refs>& refs, int64_t group, const typename Refs::Number* w,
                                      int64_t from, int64_t to, double g, double scale, typename Refs::Number* a,
                                      typename Refs::Number* p, const AverageSums<Refs>& sums) {
    using Number = typename Refs::Number;
    LogitSums result;
    const double* t = refs.factors(group);
    for (int64_t j = 0; j < to - from; ++j) {
        const bool present = w[j] > 0;
        const double c = present ? static_cast<double>(w[j]) * (static_cast<double>(p[j]) + g) : 0,
                     s = t ? scale * t[from + j] : scale, square = present ? static_cast<double>(a[j]) : 0;
        const double distance = refs.laplace() ? std::sqrt(square) : square;
        const double pull = !refs.laplace() ? 2 * s : distance > 0 ? s / distance : 0;
        const double exponent = c * s * distance;
        p[j] = static_cast<Number>(c * pull);  // rounded before it is summed, since the sums are subtracted
        sums.logit[from + j] += c;
        sums.pull[from + j] += static_cast<double>(p[j]);
        sums.slope[from + j] += exponent;
        result.pull += static_cast<double>(p[j]);
        result.exponent += exponent;
    }
    return result;
}

/// Stores the cotangents of what the reference points of group b have.
template <class Refs>
static void store_reference_cotangents(const AverageBackwardArguments& args, const Weighted<Refs>& refs, int64_t set,
                                       int64_t b, const AverageSums<Refs>& sums, double slope) {
    const int64_t M = args.shape.M, D = args.shape.D, V = args.width;
    Buffer<double> row(D), ref(D), values(V);
    for (int64_t place = 0; place < M; ++place) {
        const int64_t j = refs.source_index(set, place);
        refs.collect(sums.refs, place, D, row.get());
        refs.coordinates(set, place, ref.get());
        for (int64_t d = 0; d < D; ++d) row[d] -= sums.pull[place] * ref[d];
        args.g_refs.at(b, j).store(1, D, row.get(), D);
        if (args.values) {
            refs.collect(sums.values, place, V, values.get());
            args.g_values.at(b, j).store(1, V, values.get(), V);
        }
        if (args.log_weights) args.g_log_weights.at(b, j).store(1, 1, &sums.logit[place], 1);
        if (args.per_reference) {
            const double g_sigma2 = sums.slope[place] * slope / args.sigma2.number(b, j);
            args.g_sigma2.at(b, j).store(1, 1, &g_sigma2, 1);
        }
    }
}

/// The cotangents of one block of queries.
template <class Refs>
class AverageCotangents {
public:
    using Number = typename Refs::Number;
    static constexpr bool IN_FLOAT = std::is_same_v<Number, float>;

    AverageCotangents(const AverageBackwardArguments& args, const Weighted<Refs>& refs, int64_t set, int64_t b,
                      int64_t most)
        : args_(args),
          refs_(refs),
          b_(b),
          q_(refs, set, most, b),
          v_pitch_(refs.average_pitch()),
          v_(most * v_pitch_),
          g_shift_(most * q_.pitch),
          g_z_(most * q_.pitch),
          g_log_(most),
          pull_(most),
          exponent_(most),
          mean_(most),
          p_(std::min(most, Refs::SUBBLOCK) * q_.columns),
          a_(std::min(most, Refs::SUBBLOCK) * q_.columns) {}

    void add(int64_t first, int64_t count, const AverageSums<Refs>& sums) {
        const int64_t D = args_.shape.D;
        take(first, count);
        q_.template visit_weights<true>(
            [&](int64_t at, int64_t rows, int64_t from, int64_t to) { visit(at, rows, from, to, sums); });
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < D; ++d)
                g_z_[n * q_.pitch + d] -=
                    pull_[n] * refs_.local(q_.at(q_.x, n)[d]) + (args_.values ? 0 : g_shift_[n * q_.pitch + d]);
        args_.g_z.at(b_, first).store(count, D, g_z_.get(), q_.pitch);
        const double slope = args_.laplace ? 0.5 : 1;
        for (int64_t n = 0; n < count && !args_.per_reference; ++n) {
            const double g_sigma2 = exponent_[n] * slope / q_.variance[n];
            args_.g_sigma2.at(b_, first + n).store(1, 1, &g_sigma2, 1);
        }
    }

private:
    /// Loads a block of queries and their cotangents.
    void take(int64_t first, int64_t count) {
        const int64_t D = args_.shape.D;
        q_.take(args_.z.at(b_, first), variances_of(args_, b_, first), count, first, args_.indices);
        std::fill_n(v_.get(), count * v_pitch_, 0.0);
        std::fill_n(g_z_.get(), count * q_.pitch, 0.0);
        args_.g_average.at(b_, first).load(count, args_.width, v_.get(), v_pitch_);
        if (!args_.values) args_.g_shift.at(b_, first).load(count, D, g_shift_.get(), q_.pitch);
        for (int64_t n = 0; n < count; ++n) {
            for (int64_t d = 0; !args_.values && d < D; ++d) v_[n * v_pitch_ + d] += g_shift_[n * q_.pitch + d];
            g_log_[n] = args_.g_log_sum.number(b_, first + n);
            pull_[n] = exponent_[n] = 0;
        }
    }

    void visit(int64_t at, int64_t rows, int64_t from, int64_t to, const AverageSums<Refs>& sums) {
        const int64_t D = args_.shape.D, columns = q_.columns;
        const double* v = v_.get() + at * v_pitch_;
        // A query that has no reference point left has no mean, and adds nothing.
        for (int64_t n = at; n < at + rows; ++n)
            mean_[n] = q_.total[n] == 0 ? 0 : q_.along_mean(v_.get() + n * v_pitch_, n);
        q_.outer(q_.w.get(), rows, from, to, v, args_.width, v_pitch_, args_.values ? sums.values : sums.refs);
        q_.dots(v, at, rows, from, to, mean_.get() + at, p_.get());
        q_.raw_distances(at, rows, from, to, a_.get());
        for (int64_t i = 0; i < rows; ++i) {
            const LogitSums found =
                cotangents_of_logits(refs_, b_, q_.w.get() + i * columns, from, to, g_log_[at + i], q_.scale[at + i],
                                     a_.get() + i * columns, p_.get() + i * columns, sums);
            pull_[at + i] += found.pull;
            exponent_[at + i] += found.exponent;
        }
        q_.moments(p_.get(), at, rows, from, to, g_z_.get() + at * q_.pitch);
        q_.outer(p_.get(), rows, from, to, q_.at(q_.x, at), D, q_.pitch, sums.refs);
    }

    const AverageBackwardArguments& args_;
    const Weighted<Refs>& refs_;
    const int64_t b_;
    Queries<Weighted<Refs>> q_;
    const int64_t v_pitch_;
    Buffer<double> v_, g_shift_, g_z_, g_log_, pull_, exponent_, mean_;
    Buffer<Number> p_, a_;  // of a tile
};

/// Cotangents of all arguments.
///
/// With v the cotangent of the average and g that of the log-sum, a logit has the cotangent
/// c_j = w_j ((v_j - average).v + g); the rest is the chain rule through the logit, and through v_j in the average.
template <class Refs>
static void kernel_average_backward_with(const AverageBackwardArguments& args) {
    if (args.is_plain()) return kde_backward_with<Refs>(plain_of(args));
    const int64_t B = args.shape.B, N = args.shape.N, D = args.shape.D;
    const Source source = source_of(args);
    const Weighted<Refs> refs(args, source);
    const Partial partial(B, N, Refs::BLOCK, args.threads, AverageSums<Refs>::size(refs, D));
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* part) {
        const AverageSums<Refs> sums(refs, D, part);
        const int64_t most = std::min(share, Refs::BLOCK);
        AverageCotangents<Refs> cotangents(args, refs, source.set_of(b), b, most);
        for (int64_t first = begin; first < begin + share; first += most)
            cotangents.add(first, std::min(most, begin + share - first), sums);
    });
    partial.collect([&](int64_t b, double* part) {
        store_reference_cotangents(args, refs, source.set_of(b), b, AverageSums<Refs>(refs, D, part),
                                   args.laplace ? 0.5 : 1);
    });
}
