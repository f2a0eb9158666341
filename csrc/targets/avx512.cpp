// x86-64 with AVX-512 (Intel servers since 2017, AMD since 2022).
#if defined(__x86_64__)
#include "prelude.h"

#define FLUX_TARGET avx512
#define FLUX_LANES 8
#define FLUX_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#include "../kernels/all.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#include "../kernels/all.h"
#endif
#endif
