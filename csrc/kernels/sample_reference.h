// A reference point per query, drawn with the weights of a kernel: the j with the least E_j/w_j, E exponential numbers.
//
// Included inside of a target's namespace. Everything is in double, so that all backends draw the same points.

/// Exponential random numbers -log u, u = (word + 1/2)/2^32, of LANES elements of the stream.
FLUX_INLINE Vec exponential_numbers(uint64_t seed, Word element) {
    const Word block = element >> 2, place = element & 3;
    Word counter[4] = {block & LOW, block >> 32, Word{}, REFERENCE + Word{}};
    philox(counter, seed);
    const Word low = place == 0 ? counter[0] : counter[1], high = place == 2 ? counter[2] : counter[3];
    return -logarithm((to_double(place < 2 ? low : high) + 0.5) * 0x1p-32);
}

/// The least ratio so far and its reference point.
struct Drawn {
    double ratio = INFINITY;
    int64_t index = 0;
};

/// Takes the reference points [begin, end) with their weights into account; `first` is the element of the query's pair
/// with the reference point 0.
template <class Refs>
static void draw(const Refs& refs, int64_t set, uint64_t seed, int64_t first, const double* w, int64_t begin,
                 int64_t end, Drawn& drawn) {
    for (int64_t j = begin; j < end; j += LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, end - j));
        bool any = false;
        for (int i = 0; i < count; ++i) any |= w[j - begin + i] > 0;
        if (!any) continue;
        Word element = {};
        for (int i = 0; i < count; ++i) element[i] = static_cast<uint64_t>(first + refs.source_index(set, j + i));
        const Vec numbers = exponential_numbers(seed, element);
        for (int i = 0; i < count; ++i) {
            const double weight = w[j - begin + i], ratio = weight > 0 ? numbers[i] / weight : INFINITY;
            if (ratio < drawn.ratio) drawn = {ratio, static_cast<int64_t>(element[i]) - first};
        }
    }
}

template <class Refs>
static void sample_reference_with(const SampleArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M;
    const Source source = source_of(args);
    const Weighted<Refs> refs(args, source);
    each_block(B, N, Refs::BLOCK, args.threads, [&](int64_t b, int64_t first, int64_t count) {
        const int64_t set = source.set_of(b);
        Queries<Weighted<Refs>> q(refs, set, count, b);
        q.take(args.z.at(b, first), variances_of(args, b, first), count, first, nullptr);
        std::vector<Drawn> drawn(count);
        q.template visit_weights<false>([&](int64_t at, int64_t rows, int64_t from, int64_t to) {
            for (int64_t i = 0; i < rows; ++i)
                draw(refs, set, args.seed, (b * N + first + at + i) * M, q.w.get() + i * q.columns, from,
                     std::min(to, M), drawn[at + i]);
        });
        for (int64_t n = 0; n < count; ++n) args.index[b * N + first + n] = drawn[n].index;
    });
}

static void sample_reference(const SampleArguments& args) {
    if (args.shape.D > Columns::MOST_DIMENSIONS)
        sample_reference_with<Rows>(args);
    else
        sample_reference_with<Columns>(args);
}
