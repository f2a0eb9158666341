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

/// Whether an op of many dimensions takes its arguments in float32.
static bool narrow(const KdeArguments& args) {
    return args.z.type != Type::float64 && args.refs.type != Type::float64;
}
template <class Arguments>
static bool narrow(const Arguments&) {
    return false;
}
template <class Arguments>
static void floats(const Arguments&) {}
static void floats(const KdeArguments& args) { kde_floats(args); }

#define FLUX_BY_DIMENSION(name, Arguments)            \
    static void name(const Arguments& args) {         \
        if (args.shape.D <= Columns::MOST_DIMENSIONS) \
            name##_with<Columns>(args);               \
        else if (narrow(args))                        \
            floats(args);                             \
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
    FLUX_NAME(FLUX_TARGET), FLUX_TARGET::normals, FLUX_TARGET::exponentials_per_second,
    FLUX_TARGET::multiply_adds_per_second,
    &FLUX_TARGET::float_debug,
    FLUX_FOR_EACH_KERNEL(FLUX_ENTRY)  //
};

}  // namespace flux
