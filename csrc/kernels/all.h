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

#include "residual.h"

#include "langevin.h"

#include "transition.h"

#include "limits.h"

#include "float_rows.h"

#include "float_product.h"

#include "float_queries.h"

#include "float_kde.h"

#include "float_backward.h"

#include "float_langevin.h"

#include "float_transition.h"

#include "float_residual.h"

/// Whether an op of many dimensions computes in float32: where no argument is float64.
static bool narrow(const Array& one, const Array& other) {
    return one.type != Type::float64 && other.type != Type::float64;
}
static bool narrow(const KdeArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const KdeBackwardArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const ResidualArguments& args) { return narrow(args.z, args.refs); }
static bool narrow(const LangevinArguments& args) { return narrow(args.x, args.refs); }
static bool narrow(const TransitionArguments& args) { return narrow(args.x0, args.xt); }

#define FLUX_BY_DIMENSION(name, Arguments)            \
    static void name(const Arguments& args) {         \
        if (args.shape.D <= Columns::MOST_DIMENSIONS) \
            name##_with<Columns>(args);               \
        else if (narrow(args))                        \
            name##_floats(args);                      \
        else                                          \
            name##_with<Rows>(args);                  \
    }
FLUX_FOR_EACH_KERNEL(FLUX_BY_DIMENSION)

}  // namespace FLUX_TARGET

#define FLUX_STRING(name) #name
#define FLUX_NAME(name) FLUX_STRING(name)
#define FLUX_JOIN(a, b) a##b
#define FLUX_TABLE(target) FLUX_JOIN(target, _kernels)
#define FLUX_ENTRY(kernel, Arguments) FLUX_TARGET::kernel,
const Kernels FLUX_TABLE(FLUX_TARGET) = {
    FLUX_NAME(FLUX_TARGET),
    FLUX_TARGET::normals,
    FLUX_TARGET::exponentials_per_second,
    FLUX_TARGET::multiply_adds_per_second,
    &FLUX_TARGET::float_debug,
    FLUX_FOR_EACH_KERNEL(FLUX_ENTRY)  //
};

}  // namespace flux
