// Any machine: SSE2 on x86-64, NEON on arm64.
#include "prelude.h"

#define FLUX_TARGET baseline
#define FLUX_LANES 2
#if defined(__aarch64__)
#define FLUX_REGISTERS 32
#else
#define FLUX_REGISTERS 16
#endif
#include "../kernels/all.h"
