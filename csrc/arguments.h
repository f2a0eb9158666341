// What the kernels take, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "array.h"

namespace flux {

constexpr double PI = 3.14159265358979323846;
constexpr double EPSILON = 2.220446049250313e-16;  // of double
// Streams of random numbers, as in fluxkernels/philox.py.
constexpr uint64_t CHAIN = 0, START = 1;

/// B groups, each of N queries and M centres in D dimensions.
struct Shape {
    int64_t B, N, M, D;
};

struct KdeArguments {
    Shape shape;
    int threads;
    Array z, refs, sigma2;           // [B, N, D], [B, M, D], [B, N]
    Array shift, mean, log_density;  // results: [B, N, D] twice, [B, N]
};

struct KdeBackwardArguments {
    Shape shape;
    int threads;
    Array g_shift, g_mean, g_log_density, z, refs, sigma2;
    Array g_z, g_refs, g_sigma2;  // results
};

struct ResidualArguments {
    Shape shape;
    int threads;
    Array z, field, refs, sigma2;
    Array gradient;  // result, [B, N, D]
};

struct LangevinArguments {
    Shape shape;
    int threads;
    Array x, refs, sigma2, tau;  // sigma2 and tau [B]
    int64_t steps;
    std::vector<Array> noise;       // [B, N, D] for each step, before them one for x0 if that is asked for; or empty:
    uint64_t seed;                  // then the noise is that of the seed
    Array x0, shift0, xt, shift_t;  // results; no x0: the chain starts from x. No shift0, shift_t: not asked for.
};

/// Queries are the N ends of chains, centres come from the M starts.
struct TransitionArguments {
    Shape shape;
    int threads;
    Array x0, shift0, xt, sigma2, tau;
    Array values;  // [B, N, values_count], of the average only
    int64_t values_count;
    Array result;  // [B, M, N] weights, or [B, M, values_count] averages
};

/// The kernels as compiled for one instruction set.
struct Kernels {
    const char* name;
    void (*kde)(const KdeArguments&);
    void (*kde_backward)(const KdeBackwardArguments&);
    void (*residual_gradient)(const ResidualArguments&);
    void (*langevin)(const LangevinArguments&);
    void (*transition_weights)(const TransitionArguments&);
    void (*transition_average)(const TransitionArguments&);
    void (*normals)(uint64_t seed, uint64_t stream, uint64_t step, int64_t first, int64_t count, double* out);
    double (*exponentials_per_second)(int threads);
    double (*multiply_adds_per_second)(int threads);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace flux
