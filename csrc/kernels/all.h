// All kernels for one instruction set. Included once by each file of ../targets/, which names it: FLUX_TARGET, a
// namespace; FLUX_LANES, doubles in a vector; FLUX_REGISTERS, vectors that fit into registers.

namespace flux {
namespace FLUX_TARGET {

#include "simd.h"

#include "philox.h"

#include "centres.h"

#include "queries.h"

#include "blocks.h"

#include "kde.h"

#include "residual.h"

#include "langevin.h"

#include "transition.h"

#include "limits.h"

#define FLUX_BY_DIMENSION(name, Arguments)            \
    static void name(const Arguments& args) {         \
        if (args.shape.D <= Columns::MOST_DIMENSIONS) \
            name##_with<Columns>(args);               \
        else                                          \
            name##_with<Rows>(args);                  \
    }
FLUX_BY_DIMENSION(kde, KdeArguments)
FLUX_BY_DIMENSION(kde_backward, KdeBackwardArguments)
FLUX_BY_DIMENSION(residual_gradient, ResidualArguments)
FLUX_BY_DIMENSION(langevin, LangevinArguments)
FLUX_BY_DIMENSION(transition_weights, TransitionArguments)
FLUX_BY_DIMENSION(transition_average, TransitionArguments)

}  // namespace FLUX_TARGET

#define FLUX_STRING(name) #name
#define FLUX_NAME(name) FLUX_STRING(name)
#define FLUX_JOIN(a, b) a##b
#define FLUX_TABLE(target) FLUX_JOIN(target, _kernels)
const Kernels FLUX_TABLE(FLUX_TARGET) = {
    FLUX_NAME(FLUX_TARGET),
    FLUX_TARGET::kde,
    FLUX_TARGET::kde_backward,
    FLUX_TARGET::residual_gradient,
    FLUX_TARGET::langevin,
    FLUX_TARGET::transition_weights,
    FLUX_TARGET::transition_average,
    FLUX_TARGET::normals,
    FLUX_TARGET::exponentials_per_second,
    FLUX_TARGET::multiply_adds_per_second,
};

}  // namespace flux
