// All kernels for one instruction set. Each file of ../targets/ includes this once and defines the set: FLUX_TARGET, a
// namespace; FLUX_LANES, doubles in a vector; FLUX_REGISTERS, vectors that fit into registers.

namespace flux {
namespace FLUX_TARGET {

#include "simd.h"

#include "philox.h"

#include "refs.h"

#include "queries.h"

#include "blocks.h"

#include "kde.h"

#include "weighting.h"

#include "kernel_average.h"

#include "sample_reference.h"

#include "residual.h"

#include "langevin.h"

#include "transition.h"

#include "limits.h"

#include "float_rows.h"

#include "float_product.h"

#include "float_weighting.h"

#include "float_queries.h"

#include "float_kde.h"

#include "float_backward.h"

#include "float_average.h"

#include "float_langevin.h"

#include "float_transition.h"

#include "float_residual.h"

/// Whether the kernels may compute in float: no array is in double, and all numbers are in the range for it.
static bool fit_float(const Array& points, const Shape& shape, int64_t rows) {
    return points.type != Type::float64 && points.largest(shape.B, rows, shape.D) <= LARGEST;
}
/// The same for factors of coordinates in derivatives, of which even the largest may be too small.
static bool fit_float_as_factor(const Array& points, const Shape& shape) {
    constexpr double LEAST = 1e-12;
    if (points.type == Type::float64) return false;
    const double largest = points.largest(shape.B, shape.N, shape.D);
    return largest == 0 || (largest >= LEAST && largest <= LARGEST);
}
static bool variances_fit_float(const Array& sigma2, int64_t B, int64_t count) {
    if (sigma2.type == Type::float64) return false;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t n = 0; n < (sigma2.stride[1] ? count : 1); ++n)
            if (!fits_float(sigma2.number(b, n))) return false;
    return true;
}
static bool fit_float(const Array& z, const Array& refs, const Array& sigma2, const Shape& shape) {
    return fit_float(z, shape, shape.N) && fit_float(refs, shape, shape.M) &&
           variances_fit_float(sigma2, shape.B, shape.N);
}
static bool fit_float(const KdeArguments& args) { return fit_float(args.z, args.refs, args.sigma2, args.shape); }
static bool fit_float(const KdeBackwardArguments& args) {
    return fit_float(args.z, args.refs, args.sigma2, args.shape) && fit_float_as_factor(args.g_shift, args.shape) &&
           fit_float_as_factor(args.g_mean, args.shape);
}
static bool fit_float(const AverageArguments& args) {
    const Shape& shape = args.shape;
    return fit_float(args.z, shape, shape.N) && fit_float(args.refs, shape, shape.M) &&
           variances_fit_float(args.sigma2, shape.B, args.per_reference ? shape.M : shape.N) &&
           (!args.values || fit_float(args.values, {shape.B, shape.N, shape.M, args.width}, shape.M));
}
static bool fit_float(const AverageBackwardArguments& args) {
    const Shape of_average{args.shape.B, args.shape.N, args.shape.M, args.width};
    return fit_float(static_cast<const AverageArguments&>(args)) && fit_float_as_factor(args.g_average, of_average) &&
           (!args.g_shift || fit_float_as_factor(args.g_shift, args.shape));
}
static bool fit_float(const ResidualArguments& args) {
    return fit_float(args.z, args.refs, args.sigma2, args.shape) && fit_float_as_factor(args.field, args.shape);
}
static bool fit_float(const LangevinArguments& args) { return fit_float(args.x, args.refs, args.sigma2, args.shape); }
static bool fit_float(const TransitionArguments& args) {
    return fit_float(args.xt, args.x0, args.sigma2, args.shape) && fit_float(args.shift0, args.shape, args.shape.M);
}

/// Whether an op of many dimensions computes in float32: where no argument is float64.
static bool narrow(const Array& one, const Array& other) {
    return one.type != Type::float64 && other.type != Type::float64;
}
static bool narrow(const KdeArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const KdeBackwardArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const AverageArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const ResidualArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const LangevinArguments& args) { return narrow(args.x, args.refs); }
static bool narrow(const TransitionArguments& args) { return narrow(args.x0, args.xt); }

#define FLUX_BY_DIMENSION(name, Arguments)             \
    static void name(const Arguments& args) {          \
        if (args.shape.D > Columns::MOST_DIMENSIONS) { \
            if (narrow(args))                          \
                name##_floats(args);                   \
            else                                       \
                name##_with<Rows>(args);               \
        } else if (fit_float(args)) {                  \
            name##_with<FloatColumns>(args);           \
        } else {                                       \
            name##_with<Columns>(args);                \
        }                                              \
    }
FLUX_FOR_EACH_FLOAT_KERNEL(FLUX_BY_DIMENSION)

}  // namespace FLUX_TARGET

#define FLUX_STRING(name) #name
#define FLUX_NAME(name) FLUX_STRING(name)
#define FLUX_JOIN(a, b) a##b
#define FLUX_TABLE(target) FLUX_JOIN(target, _kernels)
#define FLUX_ENTRY(kernel, Arguments) FLUX_TARGET::kernel,
const Kernels FLUX_TABLE(FLUX_TARGET) = {
    FLUX_NAME(FLUX_TARGET), FLUX_TARGET::normals, FLUX_TARGET::rates, &FLUX_TARGET::float_debug,
    FLUX_FOR_EACH_KERNEL(FLUX_ENTRY)  //
};

}  // namespace flux
