// Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) with the layout of fluxkernels/philox.py.
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

/// Standard normal numbers of elements first, ..., first + count - 1 of one step of a stream.
static void normals(uint64_t seed, uint64_t stream, uint64_t step, int64_t first, int64_t count, double* out) {
    const int64_t last = first + count;
    for (int64_t block = first / 4; 4 * block < last; block += LANES) {
        Word index;
        for (int i = 0; i < LANES; ++i) index[i] = uint64_t(block + i);
        Word counter[4] = {index & LOW, index >> 32, step + Word{}, stream + Word{}};
        philox(counter, seed);
        Vec normal[4];
        box_muller(counter[0], counter[1], normal[0], normal[1]);
        box_muller(counter[2], counter[3], normal[2], normal[3]);
        double together[4 * LANES];
        for (int i = 0; i < LANES; ++i)
            for (int word = 0; word < 4; ++word) together[4 * i + word] = normal[word][i];
        const int64_t from = std::max(first - 4 * block, int64_t{0}), to = std::min(last - 4 * block, int64_t{4 * LANES});
        std::copy(together + from, together + to, out + 4 * block + from - first);
    }
}
