// Cuts the work of an op into tasks, and holds what every op does at its beginning and end.
//
// Included inside of a target's namespace.

/// The reference points of an array [B, M, D], for `variances` numbers sigma2 [B, variances] or [B]. Groups that share
/// their reference points get one set.
static Source source_of(const Array& refs, const Shape& shape, const Array& sigma2, int64_t variances,
                        bool laplace = false) {
    const bool shared = refs.stride[0] == 0;
    const auto reach = [=](int64_t set, double cut) {
        double widest = 0;
        for (int64_t b = shared ? 0 : set; b < (shared ? shape.B : set + 1); ++b)
            for (int64_t n = 0; n < (sigma2.stride[1] == 0 ? 1 : variances); ++n)
                widest = std::max(widest, sigma2.number(b, n));
        return laplace ? std::sqrt(widest) * cut : std::sqrt(2 * widest * cut);
    };
    return {shared ? 1 : shape.B, shape.M, shape.D,
            [=](int64_t set, int64_t first, int64_t last, double* out, int64_t pitch) {
                refs.at(set, 0, first).load(shape.M, last - first, out, pitch);
            },
            reach};
}
static Source source_of(const Array& refs, const Shape& shape, const Array& sigma2) {
    return source_of(refs, shape, sigma2, shape.N);
}

/// Calls run(b, first, count) for blocks of at most `block` of the N queries of each group.
template <class F>
static void each_block(int64_t groups, int64_t N, int64_t block, int threads, F run) {
    // Smaller blocks where there would be fewer than one per thread.
    block = std::min(block, std::max<int64_t>(round_up((groups * N + threads - 1) / threads, HEIGHT), HEIGHT));
    const int64_t blocks = (N + block - 1) / block;
    parallel_for(groups * blocks, threads, [&](int64_t task) {
        const int64_t first = task % blocks * block;
        run(task / blocks, first, std::min(block, N - first));
    });
}

/// Sums over the queries of a group. Each thread sums one part of the queries; the parts are added in their order.
class Partial {
public:
    Partial(int64_t groups, int64_t N, int64_t block, int threads, int64_t size)
        : groups_(groups),
          parts_(groups >= threads ? 1 : std::min<int64_t>(threads, (N + block - 1) / block)),
          share_(round_up((N + parts_ - 1) / parts_, block)),
          N_(N),
          threads_(threads),
          size_(size),
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

    /// Calls run(b, sum) with the whole sum of group b.
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
