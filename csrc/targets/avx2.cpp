// x86-64 with AVX2 and FMA (Intel since 2013, AMD since 2015).
#if defined(__x86_64__)
#include "prelude.h"

#define FLUX_TARGET avx2
#define FLUX_LANES 4
#define FLUX_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "../kernels/all.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx2,fma")
#include "../kernels/all.h"
#endif
#endif
