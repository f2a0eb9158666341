// Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) with the counters of fluxkernels/philox.py.
//
// Included inside of a target's namespace.

constexpr uint64_t LOW = 0xffffffff;

/// Ten rounds on LANES counters at once; 32-bit words in 64-bit lanes.
FLUX_INLINE void philox(Word counter[4], uint64_t seed) {
    uint64_t key0 = seed & LOW, key1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
        const Word product0 = counter[0] * uint64_t{0xD2511F53}, product1 = counter[2] * uint64_t{0xCD9E8D57};
        counter[0] = (product1 >> 32) ^ counter[1] ^ key0;
        counter[2] = (product0 >> 32) ^ counter[3] ^ key1;
        counter[1] = product1 & LOW;
        counter[3] = product0 & LOW;
        key0 = (key0 + 0x9E3779B9) & LOW;
        key1 = (key1 + 0xBB67AE85) & LOW;
    }
}

/// Normal numbers from two words each, by Box and Muller: radius of u = (a + 1/2)/2^32, angle 2 pi b/2^32.
FLUX_INLINE void box_muller(Word a, Word b, Vec& first, Vec& second) {
    const Vec radius = root(logarithm((to_double(a) + 0.5) * 0x1p-32) * -2.0);
    Vec cosine, sine;
    turn(b, cosine, sine);
    first = radius * cosine;
    second = radius * sine;
}

/// Standard normal numbers 4 block, ..., 4 (block + vectors LANES) - 1 of one step of a stream, vectors <= MOST.
///
/// Each stage handles all vectors before the next stage begins: the operations on one vector depend on each other, and
/// there are too many of them for a processor to start on the next vector by itself.
template <int MOST>
static void normal_blocks(uint64_t seed, uint64_t stream, uint64_t step, int64_t block, int vectors, double* out) {
    static constexpr uint64_t COUNT[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    Word lane, word[4][MOST];
    std::memcpy(&lane, COUNT, sizeof lane);
    for (int v = 0; v < vectors; ++v) {
        const Word index = lane + uint64_t(block + v * LANES);
        Word counter[4] = {index & LOW, index >> 32, step + Word{}, stream + Word{}};
        philox(counter, seed);
        for (int k = 0; k < 4; ++k) word[k][v] = counter[k];
    }
    double normal[4][MOST * LANES];
    for (int k = 0; k < 4; k += 2)
        for (int v = 0; v < vectors; ++v) {
            Vec first, second;
            box_muller(word[k][v], word[k + 1][v], first, second);
            store(normal[k] + v * LANES, first);
            store(normal[k + 1] + v * LANES, second);
        }
    for (int i = 0; i < vectors * LANES; ++i)
        for (int k = 0; k < 4; ++k) out[4 * i + k] = normal[k][i];
}

/// Standard normal numbers of elements first, ..., first + count - 1 of one step of a stream.
static void normals(uint64_t seed, uint64_t stream, uint64_t step, int64_t first, int64_t count, double* out) {
    constexpr int MOST = 16;
    constexpr int64_t VECTOR = 4 * LANES;
    const int64_t last = first + count;
    double some[VECTOR * MOST];
    for (int64_t e = first / 4 * 4; e < last; e += VECTOR * MOST) {
        const int vectors = static_cast<int>(std::min<int64_t>(MOST, (last - e + VECTOR - 1) / VECTOR));
        const bool inside = e >= first && e + vectors * VECTOR <= last;
        normal_blocks<MOST>(seed, stream, step, e / 4, vectors, inside ? out + e - first : some);
        if (!inside)
            for (int64_t i = std::max(first, e); i < std::min(last, e + vectors * VECTOR); ++i)
                out[i - first] = some[i - e];
    }
}
