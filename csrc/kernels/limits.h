// Measures how fast this machine does the operations of the kernels, in numbers per second on all threads.
//
// Included inside of a target's namespace.

/// Repeats `pass`, which does `count` operations, on every thread for about 50 ms; the best of three.
template <class F>
static double rate_of(int threads, int64_t count, F pass) {
    constexpr int64_t REPEATS = 20000;
    double best = 0;
    for (int trial = 0; trial < 3; ++trial) {
        const auto begin = std::chrono::steady_clock::now();
        parallel_for(threads, threads, [&](int64_t) {
            for (int64_t i = 0; i < REPEATS; ++i) pass();
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, REPEATS * count * threads / seconds.count());
    }
    return best;
}

template <class Number>
static double exponentials_per_second(int threads) {
    constexpr int64_t COUNT = 1024;
    return rate_of(threads, COUNT, [] {
        alignas(64) static thread_local Number a[COUNT] = {}, w[COUNT];
        // The result is used, so that the compiler cannot leave the work out.
        volatile double keep = exponentials(a, COUNT, 0.0, 1.0, 30.0, 1.0, w);
        (void)keep;
    });
}

template <class Number>
static double multiply_adds_per_second(int threads) {
    using Vector = std::conditional_t<std::is_same_v<Number, float>, Floats, Vec>;
    constexpr int64_t CHAINS = 12, LENGTH = 128;
    return rate_of(threads, CHAINS * LENGTH * sizeof(Vector) / sizeof(Number), [] {
        static thread_local Number start = 1;
        Vector total[CHAINS];
        for (int u = 0; u < CHAINS; ++u) total[u] = broadcast(static_cast<Number>(start + u));
        const Vector factor = broadcast(static_cast<Number>(start * Number(0.999)));
        for (int64_t i = 0; i < LENGTH; ++i)
            for (int u = 0; u < CHAINS; ++u) total[u] = total[u] * factor + factor;
        for (int u = 1; u < CHAINS; ++u) total[0] += total[u];
        volatile double keep = sum(total[0]);
        (void)keep;
    });
}

/// Exponentials and multiply-adds per second, of floats or doubles.
static std::pair<double, double> rates(int threads, bool floats) {
    return floats ? std::make_pair(exponentials_per_second<float>(threads), multiply_adds_per_second<float>(threads))
                  : std::make_pair(exponentials_per_second<double>(threads), multiply_adds_per_second<double>(threads));
}
