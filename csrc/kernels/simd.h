// Vectors of LANES doubles or 2 LANES floats, and the functions on them that the kernels need.
//
// Included once per instruction set, inside of the namespace of that target (see targets/). The vector types are those
// of GCC and Clang. Where a target has no 512-bit registers or fused multiply-add, the compiler replaces them, so one
// source works for every machine.

constexpr int LANES = FLUX_LANES;
// A register tile: HEIGHT x WIDTH accumulators and their operands fit into the registers.
constexpr int HEIGHT = 4;
constexpr int WIDTH = FLUX_REGISTERS >= 32 ? 4 : 2;

typedef double Vec __attribute__((vector_size(8 * FLUX_LANES)));
typedef uint64_t Word __attribute__((vector_size(8 * FLUX_LANES)));
typedef double Unaligned __attribute__((vector_size(8 * FLUX_LANES), aligned(8), may_alias));

/// The same for floats, twice as many in a register.
constexpr int FLOATS = 2 * LANES;
typedef float Floats __attribute__((vector_size(8 * FLUX_LANES)));
typedef uint32_t FloatWord __attribute__((vector_size(8 * FLUX_LANES)));
typedef float UnalignedFloats __attribute__((vector_size(8 * FLUX_LANES), aligned(4), may_alias));

#define FLUX_INLINE static inline __attribute__((always_inline))
// Stands before a loop over a register tile: its vectors stay in registers only if the loop is unrolled completely.
#define FLUX_UNROLL _Pragma("GCC unroll 8")

FLUX_INLINE Vec load(const double* p) { return *reinterpret_cast<const Unaligned*>(p); }
FLUX_INLINE void store(double* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
FLUX_INLINE Vec broadcast(double x) { return x - Vec{}; }
FLUX_INLINE Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
FLUX_INLINE void store(float* p, Floats v) { *reinterpret_cast<UnalignedFloats*>(p) = v; }
FLUX_INLINE Floats broadcast(float x) { return x - Floats{}; }
FLUX_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
FLUX_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
FLUX_INLINE Word bits(Vec v) { return reinterpret_cast<Word>(v); }
FLUX_INLINE Vec from_bits(Word w) { return reinterpret_cast<Vec>(w); }

/// LANES floats as doubles, and the reverse.
typedef float HalfFloats __attribute__((vector_size(4 * FLUX_LANES)));
typedef float UnalignedHalf __attribute__((vector_size(4 * FLUX_LANES), aligned(4), may_alias));
FLUX_INLINE Vec widen(const float* p) {
    return __builtin_convertvector(HalfFloats(*reinterpret_cast<const UnalignedHalf*>(p)), Vec);
}
FLUX_INLINE void narrow(float* p, Vec v) {
    *reinterpret_cast<UnalignedHalf*>(p) = __builtin_convertvector(v, HalfFloats);
}

/// Combines the lanes of a vector into one number, half with half.
template <int COUNT, class Number, class Vector, class Combine>
FLUX_INLINE Number fold(Vector v, Combine combine) {
    if constexpr (COUNT == 2) {
        return combine(v[0], v[1]);
    } else {
        typedef Number Half __attribute__((vector_size(COUNT / 2 * sizeof(Number))));
        Half part[2];
        std::memcpy(part, &v, sizeof v);
        return fold<COUNT / 2, Number>(combine(part[0], part[1]), combine);
    }
}
FLUX_INLINE double sum(Vec v) {
    return fold<LANES, double>(v, [](auto a, auto b) { return a + b; });
}
FLUX_INLINE float sum(Floats v) {
    return fold<FLOATS, float>(v, [](auto a, auto b) { return a + b; });
}
FLUX_INLINE double lowest(Vec v) {
    return fold<LANES, double>(v, [](auto a, auto b) { return a < b ? a : b; });
}
FLUX_INLINE float lowest(Floats v) {
    return fold<FLOATS, float>(v, [](auto a, auto b) { return a < b ? a : b; });
}

// Adding 1.5 * 2^52 leaves the nearest integer in the low bits of the sum; subtracting 1.5 * 2^52 again gives that
// integer as a double.
constexpr double ROUND = 6755399441055744.0;
// The double 2^52: with a smaller integer in its mantissa, it is 2^52 plus that integer.
constexpr double UNIT = 4503599627370496.0;

/// Converts integers below 2^52 to doubles (AVX2 has no such conversion).
FLUX_INLINE Vec to_double(Word integer) { return from_bits(integer | bits(broadcast(UNIT))) - UNIT; }

/// e^x for -708 < x <= 0, within one or two roundings: 2^n e^r with |r| <= log(2)/2.
FLUX_INLINE Vec exponential(Vec x) {
    const Vec shifted = x * 1.4426950408889634 + ROUND;
    const Vec n = shifted - ROUND;
    // log 2 in two parts, the first with trailing zeros, so that n times it is exact.
    const Vec r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
    // The polynomial of degree 11 with the least maximal relative error on that interval, 3e-18 (Remez's algorithm),
    // summed in pairs (Estrin's scheme), which gives a short chain of dependent operations.
    const Vec r2 = r * r, r4 = r2 * r2;
    const Vec p0 = (r * 0x1.55555555554a2p-3 + 0x1.0000000000010p-1) * r2 + (r + 1.0);
    const Vec p4 =
        (r * 0x1.a01a0110576fcp-13 + 0x1.6c16c18781105p-10) * r2 + (r * 0x1.1111111130dd5p-7 + 0x1.555555554f370p-5);
    const Vec p8 =
        (r * 0x1.ad661d8a99f75p-26 + 0x1.28b311c4abb3bp-22) * r2 + (r * 0x1.71df4520100a1p-19 + 0x1.a01992d102296p-16);
    const Vec p = (p8 * r4 + p4) * r4 + p0;
    return from_bits(bits(p) + (bits(shifted) << 52));
}

/// 2^y for -126 < y <= 0, within two roundings.
FLUX_INLINE Floats normal_power_of_two(Floats y) {
    constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23, as ROUND for doubles
    const Floats shifted = y + NEAREST;
    const Floats r = y - (shifted - NEAREST);
    // The polynomial of degree 6 with the least maximal relative error on [-1/2, 1/2] and p(0) = 1, 8e-8 with rounding.
    Floats p = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
    p = p * r + 0x1.3b2dbcp-7f;
    p = p * r + 0x1.c6aed4p-5f;
    p = p * r + 0x1.ebfbdap-3f;
    p = p * r + 0x1.62e430p-1f;
    p = p * r + 1.0f;
    return reinterpret_cast<Floats>(reinterpret_cast<FloatWord>(p) + (reinterpret_cast<FloatWord>(shifted) << 23));
}
/// The same, and 0 where y < -100: a product with a number that small could become denormal, which is slow.
FLUX_INLINE Floats power_of_two(Floats y) { return y > -100.0f ? normal_power_of_two(y) : Floats{}; }

/// log u for 0 < u < 1, within a few roundings; near 1 too, where u = 2^k (1 + f) has k = 0 and an exact f.
FLUX_INLINE Vec logarithm(Vec u) {
    constexpr uint64_t ROOT_HALF = 0x3fe6a09e667f3bcd;  // bits of sqrt(1/2): f lies in [sqrt(1/2) - 1, sqrt(2) - 1]
    const Word above = bits(u) - ROOT_HALF + (uint64_t{1024} << 52);
    const Word exponent = above >> 52;
    const Vec k = to_double(exponent) - 1024.0;
    const Vec f = from_bits(bits(u) - ((exponent - 1024) << 52)) - 1.0;
    // log(1 + f) = 2 artanh s, s = f/(2 + f); s^2 < 0.0295, so the omitted terms are below 1e-18.
    const Vec s = f / (f + 2.0), s2 = s * s;
    Vec series = broadcast(1.0 / 23);
    for (int n = 21; n >= 1; n -= 2) series = series * s2 + 1.0 / n;
    return k * 0x1.62e42fefa3800p-1 + (s * series * 2.0 + k * 0x1.ef35793c76730p-45);
}

/// Square root of every lane.
FLUX_INLINE Vec root(Vec v) {
    Vec result;
    for (int i = 0; i < LANES; ++i) result[i] = __builtin_sqrt(v[i]);
    return result;
}

/// Cosine and sine of 2 pi b / 2^32 for 32-bit integers b: whole quarter turns are removed exactly.
FLUX_INLINE void turn(Word b, Vec& cosine, Vec& sine) {
    const Word shifted = b + (uint64_t{1} << 29);
    const Word quarter = (shifted >> 30) & 3;
    const Vec angle = (to_double(shifted & ((uint64_t{1} << 30) - 1)) - 536870912.0) * 1.4629180792671596e-9;
    // Taylor series on [-pi/4, pi/4]; the omitted terms are below 5e-17.
    const Vec square = angle * angle;
    Vec s = square * (-1.0 / 1307674368000) + 1.0 / 6227020800;
    s = s * square + -1.0 / 39916800;
    s = s * square + 1.0 / 362880;
    s = s * square + -1.0 / 5040;
    s = s * square + 1.0 / 120;
    s = s * square + -1.0 / 6;
    s = s * square * angle + angle;
    Vec c = square * (1.0 / 20922789888000) + -1.0 / 87178291200;
    c = c * square + 1.0 / 479001600;
    c = c * square + -1.0 / 3628800;
    c = c * square + 1.0 / 40320;
    c = c * square + -1.0 / 720;
    c = c * square + 1.0 / 24;
    c = c * square + -0.5;
    c = c * square + 1.0;
    // Quarter turns 1 and 3 swap the two; 1 and 2 make the cosine negative, 2 and 3 the sine.
    const Word odd = -(quarter & 1);
    const Word high = (quarter >> 1) << 63;
    cosine = from_bits(((bits(s) & odd) | (bits(c) & ~odd)) ^ high ^ ((quarter & 1) << 63));
    sine = from_bits(((bits(c) & odd) | (bits(s) & ~odd)) ^ high);
}
