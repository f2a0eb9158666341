// Layout of reference points in many dimensions; see refs.h.
//
// Included inside of a target's namespace.

/// Many dimensions: one row per reference point, vectors run over coordinates, and pairs are computed in register tiles
/// like a matrix product.
class Rows {
public:
    using Number = double;
    static constexpr int64_t BLOCK = 64;
    static constexpr int64_t SUBBLOCK = BLOCK;

    Rows(const Source& source, int threads, int64_t = 0)
        : M(source.count),
          D(source.dimensions),
          padded(round_up(M, 8)),
          tile(256),
          width(round_up(D, LANES)),
          pitch(odd_lines(D)),
          data_(source.sets * padded * pitch),
          origin_(source.sets * pitch),
          cut_(log_of_least_weight(M)) {
        const int64_t chunks = (pitch + CHUNK - 1) / CHUNK;
        parallel_for(source.sets * chunks, threads,
                     [&](int64_t task) { pack(source, task / chunks, task % chunks * CHUNK); });
    }

    int64_t outer_size(int64_t V) const { return padded * odd_lines(V); }
    Product product(int64_t queries, int64_t refs) const { return Product(queries, refs); }
    double origin(int64_t set, int64_t d) const { return origin_[set * pitch + d]; }
    static double local(double x) { return x; }
    double cut() const { return cut_; }
    template <class Any>
    void window(int64_t, const double*, Any, int64_t& begin, int64_t& end) const {
        begin = 0;
        end = padded;
    }

    void distances(int64_t set, const double* x, int64_t rows, int64_t begin, int64_t end, double* a,
                   int64_t a_pitch) const {
        each_pair<false>(data_.get() + set * padded * pitch, pitch, width, x, rows, begin, end, a, a_pitch);
    }
    void dots(int64_t set, const double* v, int64_t rows, int64_t begin, int64_t end, double* p,
              int64_t p_pitch) const {
        each_pair<true>(data_.get() + set * padded * pitch, pitch, width, v, rows, begin, end, p, p_pitch);
    }
    void moments(int64_t set, const double* w, int64_t rows, int64_t begin, int64_t end, int64_t w_pitch, double* out,
                 Product& product) const {
        product.accumulate(w, w_pitch, 1, rows, end - begin, data_.get() + (set * padded + begin) * pitch, pitch, width,
                           out, pitch);
    }
    /// `out` is [padded, odd_lines(V)].
    void outer(const double* w, int64_t rows, int64_t begin, int64_t end, int64_t w_pitch, const double* v, int64_t V,
               int64_t v_pitch, double* out, Product& product) const {
        product.accumulate(w, 1, w_pitch, end - begin, rows, v, v_pitch, round_up(V, LANES), out + begin * odd_lines(V),
                           odd_lines(V));
    }
    void collect(const double* outer, int64_t place, int64_t V, double* row) const {
        std::copy_n(outer + place * odd_lines(V), V, row);
    }
    void coordinates(int64_t set, int64_t place, double* row) const {
        std::copy_n(data_.get() + (set * padded + place) * pitch, D, row);
    }
    int64_t source_index(int64_t, int64_t place) const { return place; }

    const int64_t M, D, padded, tile, width, pitch;

protected:
    /// Numbers [M, V] of the reference points of a set, as rows.
    int64_t values_size(int64_t V) const { return padded * odd_lines(V); }
    void pack_values(int64_t, const Array& from, int64_t V, double* out) const {
        const int64_t row = odd_lines(V);
        std::fill_n(out, padded * row, 0.0);
        from.load(M, V, out, row);
    }
    void value_sums(const double* values, int64_t V, const double* w, int64_t rows, int64_t begin, int64_t end,
                    int64_t w_pitch, double* out, int64_t out_pitch, Product& product) const {
        product.accumulate(w, w_pitch, 1, rows, end - begin, values + begin * odd_lines(V), odd_lines(V),
                           round_up(V, LANES), out, out_pitch);
    }
    void value_dots(const double* values, int64_t V, const double* v, int64_t rows, int64_t begin, int64_t end, int64_t,
                    double* p, int64_t p_pitch) const {
        each_pair<true>(values, odd_lines(V), round_up(V, LANES), v, rows, begin, end, p, p_pitch);
    }

private:
    static constexpr int64_t CHUNK = 128;  // columns packed at once
    // Columns processed at once: those of a tile of queries stay in a first-level cache for all reference points.
    static constexpr int64_t DEPTH = 256;

    void pack(const Source& source, int64_t set, int64_t first) {
        const int64_t last = std::min(first + CHUNK, pitch), inside = std::max(std::min(last, D), first);
        double* rows = data_.get() + set * padded * pitch;
        double* origin = origin_.get() + set * pitch;
        std::fill(origin + first, origin + last, 0.0);
        if (inside > first) source.read(set, first, inside, rows + first, pitch);
        for (int64_t j = 0; j < M; ++j)
            for (int64_t d = first; d < inside; ++d) origin[d] += rows[j * pitch + d];
        for (int64_t d = first; d < inside; ++d) origin[d] /= M;
        for (int64_t j = 0; j < M; ++j)
            for (int64_t d = first; d < inside; ++d) rows[j * pitch + d] -= origin[d];
        if (inside > first && source.move) source.move(set, first, inside, rows + first, pitch);
        for (int64_t j = 0; j < padded; ++j) {
            double* row = rows + j * pitch;
            if (j >= M) std::copy(row - pitch + first, row - pitch + inside, row + first);
            std::fill(row + inside, row + last, 0.0);
        }
    }

    /// `refs` and x have rows of `width` numbers, `pitch` apart.
    template <bool DOT>
    __attribute__((noinline)) static void each_pair(const double* refs, int64_t pitch, int64_t width, const double* x,
                                                    int64_t rows, int64_t begin, int64_t end, double* out,
                                                    int64_t out_pitch) {
        for (int64_t n = 0; n < rows; ++n) std::fill_n(out + n * out_pitch, end - begin, 0.0);
        for (int64_t depth = 0; depth < width; depth += DEPTH) {
            const int64_t columns = std::min(DEPTH, width - depth);
            for (int64_t n = 0; n < rows; n += HEIGHT)
                for (int64_t j = begin; j < end; j += WIDTH) {
                    const double *from = x + n * pitch + depth, *r = refs + j * pitch + depth;
                    double* to = out + n * out_pitch + j - begin;
                    if (n + HEIGHT <= rows)
                        pairs<DOT, HEIGHT>(from, r, pitch, columns, to, out_pitch);
                    else
                        for (int64_t i = 0; i < rows - n; ++i)
                            pairs<DOT, 1>(from + i * pitch, r, pitch, columns, to + i * out_pitch, out_pitch);
                }
        }
    }

    /// Adds the contribution of some columns to QUERIES x WIDTH pairs.
    template <bool DOT, int QUERIES>
    static void pairs(const double* x, const double* r, int64_t pitch, int64_t columns, double* out,
                      int64_t out_pitch) {
        Vec total[QUERIES][WIDTH] = {};
        for (int64_t d = 0; d < columns; d += LANES) {
            Vec ref[WIDTH];
            FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) ref[u] = load(r + u * pitch + d);
            FLUX_UNROLL for (int i = 0; i < QUERIES; ++i) {
                const Vec query = load(x + i * pitch + d);
                FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) {
                    const Vec difference = query - ref[u];
                    total[i][u] += DOT ? query * ref[u] : difference * difference;
                }
            }
        }
        FLUX_UNROLL for (int i = 0; i < QUERIES; ++i) FLUX_UNROLL for (int u = 0; u < WIDTH; ++u)
            out[i * out_pitch + u] += sum(total[i][u]);
    }

    Buffer<double> data_, origin_;
    double cut_;
};
