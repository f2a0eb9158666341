// Arguments of the kernels, the same for every instruction set, and the list of kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "array.h"

namespace flux {

constexpr double PI = 3.14159265358979323846;
constexpr double EPSILON = 2.220446049250313e-16;  // of double
// Streams of random numbers, as in fluxkernels/philox.py.
constexpr uint64_t CHAIN = 0, START = 1, REFERENCE = 12;

/// B groups; each has N queries and M reference points in D dimensions.
struct Shape {
    int64_t B, N, M, D;
};

struct KdeArguments {
    Shape shape;
    int threads;
    Array z, refs, sigma2;           // [B, N, D], [B, M, D], [B, N]
    Array shift, mean, log_density;  // those results that are wanted: [B, N, D] twice, and [B, N]
    Array log_sum{};                 // the same, log of the sum of weights: log-density without its constants, [B, N]
};

struct KdeBackwardArguments {
    Shape shape;
    int threads;
    Array g_shift, g_mean, g_log_density, z, refs, sigma2;
    Array g_z, g_refs, g_sigma2;  // results
    bool normalized = true;       // false: g_log_density is the cotangent of the log-sum
};

/// Averages of values under weights with the logits log_weights_j - |z - r_j|^2/2 sigma^2, or - |z - r_j|/sigma for the
/// Laplace kernel.
struct AverageArguments {
    Shape shape;
    int threads;
    int64_t width;  // that of the values: V, or D without values; 0 if only the log-sum is wanted
    bool exclude_self, laplace;
    bool per_reference;                // whether sigma2 is [B, M] instead of [B, N]
    Array z, refs, sigma2;             // [B, N, D], [B, M, D]
    Array values, log_weights;         // [B, M, V] or none, for the reference points; [B, M] or none, for zeros
    Array shift, average, log_sum;     // results: [B, N, D] or none, with values; [B, N, V], [B, N]
    const int64_t* indices = nullptr;  // [N], of the queries in their group; null for 0, 1, ...

    /// Whether this is a density estimate.
    bool is_plain() const { return !values && !log_weights && !exclude_self && !laplace && !per_reference; }
};

struct AverageBackwardArguments : AverageArguments {
    Array g_shift, g_average, g_log_sum;
    Array g_z, g_refs, g_sigma2, g_values, g_log_weights;  // results, the last two as their arguments
};

struct SampleArguments : AverageArguments {
    uint64_t seed;
    int64_t* index;  // result, [B, N]
};

struct ResidualArguments {
    Shape shape;
    int threads;
    Array z, field, refs, sigma2;
    Array factor;    // [B, N] or none
    Array gradient;  // result, [B, N, D]
};

struct LangevinArguments {
    Shape shape;
    int threads;
    Array x, refs, sigma2, tau;  // sigma2 and tau [B]
    int64_t steps;
    std::vector<Array> noise;       // [B, N, D] per step, preceded by that of x0 if x0 is a result; may be empty
    uint64_t seed;                  // makes the noise where `noise` is empty
    Array x0, shift0, xt, shift_t;  // results, all but xt optional; without x0 the chain starts from x
};

/// The queries are the N ends of chains; the reference points are made from the M starts.
struct TransitionArguments {
    Shape shape;
    int threads;
    Array x0, shift0, xt, sigma2, tau;
    Array values;  // [B, N, values_count], for the average only
    int64_t values_count;
    Array result;  // [B, M, N] weights, or [B, M, values_count] averages
};

/// Every kernel that has a version in float32, and its arguments.
#define FLUX_FOR_EACH_FLOAT_KERNEL(DO)                    \
    DO(kde, KdeArguments)                                 \
    DO(kde_backward, KdeBackwardArguments)                \
    DO(kernel_average, AverageArguments)                  \
    DO(kernel_average_backward, AverageBackwardArguments) \
    DO(residual_gradient, ResidualArguments)              \
    DO(langevin, LangevinArguments)                       \
    DO(transition_weights, TransitionArguments)           \
    DO(transition_average, TransitionArguments)

/// Every kernel. The rest of csrc/ iterates this list.
#define FLUX_FOR_EACH_KERNEL(DO)   \
    FLUX_FOR_EACH_FLOAT_KERNEL(DO) \
    DO(sample_reference, SampleArguments)

/// For tests of the kernels in float32. Queries that they were asked for and that they rejected; a fault: coordinates
/// are rounded to bfloat16, which they must notice.
struct FloatDebug {
    std::atomic<int64_t> seen{0}, rejected{0};
    std::atomic<bool> coarse{false};
    /// Where to write the estimated error of the logits of a block's queries, -1 for those rejected, or null.
    std::atomic<double*> estimates{nullptr};
};

/// The kernels as compiled for one instruction set.
struct Kernels {
    const char* name;
    void (*normals)(uint64_t seed, uint64_t stream, uint64_t step, int64_t first, int64_t count, double* out);
    std::pair<double, double> (*rates)(int threads, bool floats);
    FloatDebug* float_debug;
#define FLUX_DECLARE(kernel, Arguments) void (*kernel)(const Arguments&);
    FLUX_FOR_EACH_KERNEL(FLUX_DECLARE)
#undef FLUX_DECLARE
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace flux
