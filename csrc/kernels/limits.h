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

static double exponentials_per_second(int threads) {
    constexpr int64_t COUNT = 1024;
    return rate_of(threads, COUNT, [] {
        alignas(64) static thread_local double a[COUNT] = {}, w[COUNT];
        // The result is used, so that the compiler cannot leave the work out.
        volatile double keep = exponentials(a, COUNT, 0.0, 1.0, 700.0, 1.0, w);
        (void)keep;
    });
}

static double multiply_adds_per_second(int threads) {
    constexpr int64_t CHAINS = 12, LENGTH = 128;
    return rate_of(threads, CHAINS * LENGTH * LANES, [] {
        static thread_local double start = 1.0;
        Vec total[CHAINS];
        for (int u = 0; u < CHAINS; ++u) total[u] = broadcast(start + u);
        const Vec factor = broadcast(start * 0.999);
        for (int64_t i = 0; i < LENGTH; ++i)
            for (int u = 0; u < CHAINS; ++u) total[u] = total[u] * factor + factor;
        for (int u = 1; u < CHAINS; ++u) total[0] += total[u];
        volatile double keep = sum(total[0]);
        (void)keep;
    });
}
