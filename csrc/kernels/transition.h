// Transition weights (Eq. 52) and the average they define (Eq. 9): a density estimate. Its reference points are the
// means mu_i = x0_i + (1 - e^{-tau}) (m(x0_i) - x0_i) of the linearized chain, its queries are the ends of chains, and
// its variance is v = sigma^2 (1 - e^{-2 tau}).
//
// Included inside of a target's namespace.

/// v, at least rounding: tau = 0 then gives the limit, where the nearest start has all the weight, instead of 0/0.
static double variance_of(const TransitionArguments& args, int64_t b) {
    return args.sigma2.number(b) * std::max(-std::expm1(-2 * args.tau.number(b)), EPSILON * EPSILON);
}

/// The means as reference points: the starts, moved.
static Source means_of(const TransitionArguments& args) {
    return {args.shape.B,
            args.shape.M,
            args.shape.D,
            [&args](int64_t b, int64_t first, int64_t last, double* out, int64_t pitch) {
                args.x0.at(b, 0, first).load(args.shape.M, last - first, out, pitch);
            },
            [&args](int64_t b, double cut) { return std::sqrt(2 * variance_of(args, b) * cut); },
            [&args](int64_t b, int64_t first, int64_t last, double* out, int64_t pitch) {
                const double pull = -std::expm1(-args.tau.number(b));
                const int64_t starts = args.shape.M, columns = last - first;
                Buffer<double> shift(starts * columns);
                args.shift0.at(b, 0, first).load(starts, columns, shift.get(), columns);
                for (int64_t i = 0; i < starts; ++i)
                    for (int64_t d = 0; d < columns; ++d) out[i * pitch + d] += pull * shift[i * columns + d];
            }};
}

/// Loads a block of ends of chains as queries.
template <class Refs>
static void take_ends(const TransitionArguments& args, int64_t b, int64_t first, int64_t count, Queries<Refs>& q) {
    q.rows = count;
    args.xt.at(b, first).load(count, args.shape.D, q.x.get(), q.pitch);
    q.center();
    const double variance = variance_of(args, b);
    for (int64_t n = 0; n < count; ++n) q.set_variance(n, variance);
}

/// w [starts, ends]: the transpose of the weights of the ends.
template <class Refs>
static void transition_weights_with(const TransitionArguments& args) {
    const int64_t B = args.shape.B, ends = args.shape.N, starts = args.shape.M;
    const Refs means(means_of(args), args.threads);
    each_block(B, ends, 16, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        Queries<Refs> q(means, b, count);
        Buffer<double> rows(starts * count);
        std::fill_n(rows.get(), starts * count, 0.0);
        take_ends(args, b, first, count, q);
        q.template visit_weights<false>([&](int64_t at, int64_t n, int64_t from, int64_t to) {
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = from; j < std::min(to, starts); ++j)
                    rows[means.source_index(b, j) * count + at + i] = q.w[i * q.columns + j - from];
        });
        args.result.at(b, 0, first).store(starts, count, rows.get(), count);
    });
}

/// sum_j w_ij values_j [starts, V], values [ends, V].
template <class Refs>
static void transition_average_with(const TransitionArguments& args) {
    const int64_t B = args.shape.B, ends = args.shape.N, starts = args.shape.M;
    const int64_t V = args.values_count;
    const Refs means(means_of(args), args.threads);
    const Partial partial(B, ends, Refs::BLOCK, args.threads, means.outer_size(V));
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* sums) {
        const int64_t most = std::min(share, Refs::BLOCK), pitch = round_up(V, 8);
        Queries<Refs> q(means, b, most);
        Buffer<double> values(most * pitch);
        std::fill_n(values.get(), most * pitch, 0.0);
        const auto visit = [&](auto add) {
            for (int64_t first = begin; first < begin + share; first += most) {
                const int64_t count = std::min(most, begin + share - first);
                take_ends(args, b, first, count, q);
                args.values.at(b, first).load(count, V, values.get(), pitch);
                q.template visit_weights<false>(add);
            }
        };
        if constexpr (Queries<Refs>::IN_FLOAT) {
            typename Refs::Outer outer(means, V, sums);
            visit([&](int64_t n, int64_t, int64_t from, int64_t to) {
                outer.add(q.w.get(), from, to, values.get() + n * pitch);
            });
            outer.flush();
        } else {
            visit([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
                q.outer(q.w.get(), rows, from, to, values.get() + at * pitch, V, pitch, sums);
            });
        }
    });
    partial.collect([&](int64_t b, double* sums) {
        Buffer<double> row(V);
        for (int64_t place = 0; place < starts; ++place) {
            means.collect(sums, place, V, row.get());
            args.result.at(b, means.source_index(b, place)).store(1, V, row.get(), V);
        }
    });
}
