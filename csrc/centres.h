// The centres of a density estimate as doubles, in the two layouts in which pairs (query, centre) are fast.
//
// Included inside of a target's namespace. Coordinates are taken relative to the mean of a group's centres: a common
// translation changes no result, but far from the origin it would cost digits. Distances are always sums of squared
// differences, never |a|^2 + |b|^2 - 2ab, so nothing cancels.
//
// Both layouts offer the same operations on a few queries (rows) and a range of centres [begin, end):
//   distances   a_nj = |x_n - r_j|^2
//   dots        v_n . r_j
//   moments     out_n += sum_j w_nj r_j
//   outer       out_j += sum_n w_nj v_n

/// Room for n doubles in an odd number of cache lines: rows a power of two apart would fall on the same few cache sets.
static int64_t odd_lines(int64_t n) {
    const int64_t lines = (n + 7) / 8;
    return 8 * (lines % 2 ? lines : lines + 1);
}

/// What a layout is made from: raw centre coordinates [B, M, D], computed where they are needed.
struct Source {
    int64_t groups, count, dimensions;
    /// Coordinates [first, last) of all centres of group b, into rows `pitch` apart.
    std::function<void(int64_t b, int64_t first, int64_t last, double* out, int64_t pitch)> read;
};

/// Adds to `out` [P, width] the product of weights [P, K] and rows [K, width], register tile by register tile.
/// Weights that are 0 cost nothing where a register tile has no other.
class Product {
public:
    /// Room for P x K weights, P and K in either order.
    Product(int64_t P, int64_t K)
        : weights_(round_up(std::max(P, K), HEIGHT) * INNER), index_(round_up(std::max(P, K), HEIGHT) / HEIGHT * INNER),
          used_(std::max(P, K) / HEIGHT + 1) {}

    /// weight(p, k) = w[p * row_stride + k * inner_stride]
    void accumulate(const double* w, int64_t row_stride, int64_t inner_stride, int64_t P, int64_t K, const double* rows,
                    int64_t pitch, int64_t width, double* out, int64_t out_pitch) {
        for (int64_t k = 0; k < K; k += INNER) {
            gather(w + k * inner_stride, row_stride, inner_stride, P, std::min(INNER, K - k));
            const double* from = rows + k * pitch;
            int64_t d = 0;
            for (; d + WIDTH * LANES <= width; d += WIDTH * LANES) columns<WIDTH>(P, from + d, pitch, out + d, out_pitch);
            for (; d < width; d += LANES) columns<1>(P, from + d, pitch, out + d, out_pitch);
        }
    }

private:
    // Rows taken at once: a column of register tiles of them, 256 bytes each, stays in a first-level cache.
    static constexpr int64_t INNER = 128;

    /// The weights of each tile of rows side by side, with the indices k at which one of them is not 0.
    __attribute__((noinline)) void gather(const double* w, int64_t row_stride, int64_t inner_stride, int64_t P, int64_t K) {
        for (int64_t p = 0; p < P; p += HEIGHT) {
            const int64_t tile = p / HEIGHT, height = std::min<int64_t>(HEIGHT, P - p);
            double* to = weights_.get() + tile * HEIGHT * INNER;
            int32_t* index = index_.get() + tile * INNER;
            int64_t used = 0;
            for (int64_t k = 0; k < K; ++k) {
                bool any = false;
                for (int64_t i = 0; i < HEIGHT; ++i) {
                    const double value = i < height ? w[(p + i) * row_stride + k * inner_stride] : 0;
                    to[used * HEIGHT + i] = value;
                    any |= value != 0;
                }
                index[used] = static_cast<int32_t>(k);
                used += any;
            }
            used_[tile] = used;
        }
    }

    template <int VECTORS>
    __attribute__((noinline)) void columns(int64_t P, const double* rows, int64_t pitch, double* out, int64_t out_pitch) {
        for (int64_t p = 0; p < P; p += HEIGHT) {
            const int64_t tile = p / HEIGHT, height = std::min<int64_t>(HEIGHT, P - p);
            const double* w = weights_.get() + tile * HEIGHT * INNER;
            const int32_t* index = index_.get() + tile * INNER;
            Vec total[HEIGHT][VECTORS] = {};
            for (int64_t k = 0; k < used_[tile]; ++k) {
                const double* row = rows + index[k] * pitch;
                FLUX_UNROLL for (int i = 0; i < HEIGHT; ++i)
                    FLUX_UNROLL for (int u = 0; u < VECTORS; ++u) total[i][u] += w[k * HEIGHT + i] * load(row + u * LANES);
            }
            FLUX_UNROLL for (int i = 0; i < HEIGHT; ++i) {
                if (i >= height) break;
                FLUX_UNROLL for (int u = 0; u < VECTORS; ++u) {
                    double* to = out + (p + i) * out_pitch + u * LANES;
                    store(to, load(to) + total[i][u]);
                }
            }
        }
    }

    Buffer<double> weights_;
    Buffer<int32_t> index_;
    Buffer<int64_t> used_;
};

/// Few dimensions: one array a coordinate, vectors run over centres.
///
/// Where a group is wide against the bandwidth its centres are put into equal cells along its widest coordinate, in the
/// order of the cells. A query then needs only the window of centres whose weight can be above rounding, which a bound on
/// that coordinate proves.
class Columns {
public:
    static constexpr int64_t MOST_DIMENSIONS = 24;
    static constexpr int64_t BLOCK = 32;  // queries in a block: enough to fill the vectors of the random numbers
    static constexpr int64_t SUBBLOCK = 1;

    /// `widest` is the largest variance sigma^2 that the queries of group b will have.
    Columns(const Source& source, const std::function<double(int64_t)>& widest, int threads)
        : M(source.count), D(source.dimensions), padded(round_up(M, 8)), tile(std::clamp<int64_t>(4096 / D / 8 * 8, 128, 1024)),
          pitch(D), stride_(odd_lines(M)), data_(source.groups * D * stride_), origin_(source.groups * D), order_(source.groups * M),
          cells_(source.groups), first_(source.groups * (M + 1)) {
        parallel_for(source.groups, threads, [&](int64_t b) { pack(source, b, widest(b)); });
    }

    int64_t outer_size(int64_t V) const { return V * stride_; }
    Product product(int64_t, int64_t) const { return Product(0, 0); }
    const double* origin(int64_t b) const { return origin_.get() + b * D; }

    /// log(1/w) of the largest weight w, relative to the sum of all, that may be dropped: below rounding in double.
    double cut() const { return 42 + std::log(static_cast<double>(M)); }

    /// The centres that can matter to a query: [begin, end), multiples of LANES.
    void window(int64_t b, const double* x, double scale, int64_t& begin, int64_t& end) const {
        begin = 0;
        end = padded;
        const Cells& cells = cells_[b];
        if (cells.coordinate < 0) return;
        const double at = x[cells.coordinate];
        const int32_t* first = first_.get() + b * (M + 1);
        // The nearest of a few centres bounds the distance to the nearest of all.
        const int64_t near = std::min<int64_t>(first[cell(cells, at)], M - 1) / LANES * LANES;
        double a[LANES];
        pairs<false, 1>(data_.get() + b * D * stride_ + near, x, a);
        const double reach = std::sqrt(lowest(load(a)) + cut() / scale);
        begin = std::min<int64_t>(first[cell(cells, at - reach)], M - 1) / LANES * LANES;
        end = std::max(round_up(first[cell(cells, at + reach) + 1], LANES), begin + LANES);
    }

    void distances(int64_t b, const double* x, int64_t, int64_t begin, int64_t end, double* a, int64_t) const {
        each_pair<false>(b, x, begin, end, a);
    }
    void dots(int64_t b, const double* v, int64_t, int64_t begin, int64_t end, double* p, int64_t) const {
        each_pair<true>(b, v, begin, end, p);
    }

    void moments(int64_t b, const double* w, int64_t, int64_t begin, int64_t end, int64_t, double* out, Product&) const {
        const double* r = data_.get() + b * D * stride_ + begin;
        int64_t d = 0;
        for (; d + 4 <= D; d += 4) moment<4, 2>(r + d * stride_, w, end - begin, out + d);
        for (; d + 2 <= D; d += 2) moment<2, 4>(r + d * stride_, w, end - begin, out + d);
        for (; d < D; ++d) moment<1, 8>(r + d * stride_, w, end - begin, out + d);
    }

    /// `out` is [V, stride].
    void outer(const double* w, int64_t, int64_t begin, int64_t end, int64_t, const double* v, int64_t V, int64_t, double* out,
               Product&) const {
        for (int64_t i = 0; i < V; ++i) {
            double* to = out + i * stride_ + begin;
            for (int64_t j = 0; j < end - begin; j += LANES) store(to + j, load(to + j) + load(w + j) * v[i]);
        }
    }

    /// Row j of an `outer` result, j as in the source; and the coordinates of that centre.
    void collect(const double* outer, int64_t place, int64_t V, double* row) const {
        for (int64_t i = 0; i < V; ++i) row[i] = outer[i * stride_ + place];
    }
    void coordinates(int64_t b, int64_t place, double* row) const {
        for (int64_t d = 0; d < D; ++d) row[d] = data_[(b * D + d) * stride_ + place];
    }
    /// Which centre of the source is at a place.
    int64_t source_index(int64_t b, int64_t place) const { return order_[b * M + place]; }

    const int64_t M, D, padded, tile, pitch;

private:
    void pack(const Source& source, int64_t b, double widest) {
        Buffer<double> rows(M * D);
        double* origin = origin_.get() + b * D;
        source.read(b, 0, D, rows.get(), D);
        Cells& cells = cells_[b] = {-1, 0, 0};
        double range = 0;
        bool finite = true;
        for (int64_t d = 0; d < D; ++d) {
            double total = 0, least = INFINITY, most = -INFINITY;
            for (int64_t j = 0; j < M; ++j) {
                const double r = rows[j * D + d];
                total += r;
                least = std::min(least, r);
                most = std::max(most, r);
            }
            origin[d] = total / M;
            // What is not finite (it comes in unchecked from a compiled graph) has no order.
            finite = finite && std::isfinite(total);
            if (most - least > range) {
                range = most - least;
                cells = {static_cast<int32_t>(d), least - origin[d], M / range};
            }
        }
        // Windows pay if one, 2 sqrt(2 cut) sigma wide for a query amid centres, leaves out half of the range.
        if (!finite || M < 64 || range < 4 * std::sqrt(2 * widest * cut())) cells.coordinate = -1;
        int32_t* order = order_.get() + b * M;
        sort(cells, rows.get(), origin, order, first_.get() + b * (M + 1));
        for (int64_t d = 0; d < D; ++d) {
            double* to = data_.get() + (b * D + d) * stride_;
            for (int64_t j = 0; j < M; ++j) to[j] = rows[order[j] * D + d] - origin[d];
            std::fill(to + M, to + padded, to[M - 1]);  // their weights are set to 0 by the callers
        }
    }

    /// M equal cells along a coordinate (-1: none).
    struct Cells {
        int32_t coordinate;
        double least, per_unit;
    };

    int64_t cell(const Cells& cells, double value) const {
        const double place = (value - cells.least) * cells.per_unit;
        return place > 0 ? static_cast<int64_t>(std::min(place, static_cast<double>(M - 1))) : 0;
    }

    /// Fills `order` with the centres cell by cell, and `first` with the place of each cell's first one.
    void sort(const Cells& cells, const double* rows, const double* origin, int32_t* order, int32_t* first) const {
        if (cells.coordinate < 0) {
            for (int64_t j = 0; j < M; ++j) order[j] = static_cast<int32_t>(j);
            return;
        }
        const int64_t d = cells.coordinate;
        Buffer<int32_t> where(M);
        std::fill_n(first, M + 1, 0);
        for (int64_t j = 0; j < M; ++j) {
            where[j] = static_cast<int32_t>(cell(cells, rows[j * D + d] - origin[d]));
            ++first[where[j] + 1];
        }
        for (int64_t c = 0; c < M; ++c) first[c + 1] += first[c];
        for (int64_t j = 0; j < M; ++j) order[first[where[j]]++] = static_cast<int32_t>(j);
        // Each entry has moved on to the end of its cell, the place of the next one's first.
        std::copy_backward(first, first + M, first + M + 1);
        first[0] = 0;
    }

    template <bool DOT>
    void each_pair(int64_t b, const double* x, int64_t begin, int64_t end, double* out) const {
        const double* r = data_.get() + b * D * stride_;
        int64_t j = begin;
        for (; j + 8 * LANES <= end; j += 8 * LANES) pairs<DOT, 8>(r + j, x, out + j - begin);
        for (; j < end; j += LANES) pairs<DOT, 1>(r + j, x, out + j - begin);
    }
    template <bool DOT, int UNROLL>
    void pairs(const double* r, const double* x, double* out) const {
        Vec total[UNROLL] = {};
        for (int64_t d = 0; d < D; ++d)
            FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
                const Vec here = load(r + d * stride_ + u * LANES);
                const Vec difference = x[d] - here;
                total[u] += DOT ? x[d] * here : difference * difference;
            }
        FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) store(out + u * LANES, total[u]);
    }
    template <int COORDINATES, int UNROLL>
    void moment(const double* r, const double* w, int64_t n, double* out) const {
        Vec total[COORDINATES][UNROLL] = {};
        int64_t j = 0;
        for (; j + UNROLL * LANES <= n; j += UNROLL * LANES)
            FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
                const Vec weight = load(w + j + u * LANES);
                FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) total[i][u] += weight * load(r + i * stride_ + j + u * LANES);
            }
        for (; j < n; j += LANES)
            FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) total[i][0] += load(w + j) * load(r + i * stride_ + j);
        FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) {
            FLUX_UNROLL for (int u = 1; u < UNROLL; ++u) total[i][0] += total[i][u];
            out[i] += sum(total[i][0]);
        }
    }

    const int64_t stride_;  // between coordinates
    Buffer<double> data_, origin_;
    Buffer<int32_t> order_;
    Buffer<Cells> cells_;
    Buffer<int32_t> first_;
};

/// Many dimensions: one row a centre, vectors run over coordinates, pairs in register tiles like a matrix product.
class Rows {
public:
    static constexpr int64_t BLOCK = 64;
    static constexpr int64_t SUBBLOCK = BLOCK;

    Rows(const Source& source, const std::function<double(int64_t)>&, int threads)
        : M(source.count), D(source.dimensions), padded(round_up(M, 8)), tile(256), width(round_up(D, LANES)),
          pitch(odd_lines(D)), data_(source.groups * padded * pitch), origin_(source.groups * pitch) {
        const int64_t chunks = (pitch + CHUNK - 1) / CHUNK;
        parallel_for(source.groups * chunks, threads, [&](int64_t task) { pack(source, task / chunks, task % chunks * CHUNK); });
    }

    int64_t outer_size(int64_t V) const { return padded * odd_lines(V); }
    Product product(int64_t queries, int64_t centres) const { return Product(queries, centres); }
    const double* origin(int64_t b) const { return origin_.get() + b * pitch; }
    double cut() const { return 42 + std::log(static_cast<double>(M)); }
    void window(int64_t, const double*, double, int64_t& begin, int64_t& end) const {
        begin = 0;
        end = padded;
    }

    void distances(int64_t b, const double* x, int64_t rows, int64_t begin, int64_t end, double* a, int64_t a_pitch) const {
        each_pair<false>(b, x, rows, begin, end, a, a_pitch);
    }
    void dots(int64_t b, const double* v, int64_t rows, int64_t begin, int64_t end, double* p, int64_t p_pitch) const {
        each_pair<true>(b, v, rows, begin, end, p, p_pitch);
    }
    void moments(int64_t b, const double* w, int64_t rows, int64_t begin, int64_t end, int64_t w_pitch, double* out,
                 Product& product) const {
        product.accumulate(w, w_pitch, 1, rows, end - begin, data_.get() + (b * padded + begin) * pitch, pitch, width, out,
                           pitch);
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
    void coordinates(int64_t b, int64_t place, double* row) const {
        std::copy_n(data_.get() + (b * padded + place) * pitch, D, row);
    }
    int64_t source_index(int64_t, int64_t place) const { return place; }

    const int64_t M, D, padded, tile, width, pitch;

private:
    static constexpr int64_t CHUNK = 128;  // columns packed at once
    // Columns at once: those of a tile of queries stay in a first-level cache while the centres go by.
    static constexpr int64_t DEPTH = 256;

    void pack(const Source& source, int64_t b, int64_t first) {
        const int64_t last = std::min(first + CHUNK, pitch), inside = std::max(std::min(last, D), first);
        double* rows = data_.get() + b * padded * pitch;
        double* origin = origin_.get() + b * pitch;
        std::fill(origin + first, origin + last, 0.0);
        if (inside > first) source.read(b, first, inside, rows + first, pitch);
        for (int64_t j = 0; j < M; ++j)
            for (int64_t d = first; d < inside; ++d) origin[d] += rows[j * pitch + d];
        for (int64_t d = first; d < inside; ++d) origin[d] /= M;
        for (int64_t j = 0; j < padded; ++j) {
            double* row = rows + j * pitch;
            if (j >= M) {
                std::copy(row - pitch + first, row - pitch + inside, row + first);
            } else {
                for (int64_t d = first; d < inside; ++d) row[d] -= origin[d];
            }
            std::fill(row + inside, row + last, 0.0);
        }
    }

    template <bool DOT>
    __attribute__((noinline)) void each_pair(int64_t b, const double* x, int64_t rows, int64_t begin, int64_t end, double* out, int64_t out_pitch) const {
        for (int64_t n = 0; n < rows; ++n) std::fill_n(out + n * out_pitch, end - begin, 0.0);
        for (int64_t depth = 0; depth < width; depth += DEPTH) {
            const int64_t columns = std::min(DEPTH, width - depth);
            for (int64_t n = 0; n < rows; n += HEIGHT)
                for (int64_t j = begin; j < end; j += WIDTH) {
                    const double *from = x + n * pitch + depth, *r = data_.get() + (b * padded + j) * pitch + depth;
                    double* to = out + n * out_pitch + j - begin;
                    if (n + HEIGHT <= rows)
                        pairs<DOT, HEIGHT>(from, r, columns, to, out_pitch);
                    else
                        for (int64_t i = 0; i < rows - n; ++i)
                            pairs<DOT, 1>(from + i * pitch, r, columns, to + i * out_pitch, out_pitch);
                }
        }
    }

    /// Adds the contribution of some columns to QUERIES x WIDTH pairs.
    template <bool DOT, int QUERIES>
    void pairs(const double* x, const double* r, int64_t columns, double* out, int64_t out_pitch) const {
        Vec total[QUERIES][WIDTH] = {};
        for (int64_t d = 0; d < columns; d += LANES) {
            Vec centre[WIDTH];
            FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) centre[u] = load(r + u * pitch + d);
            FLUX_UNROLL for (int i = 0; i < QUERIES; ++i) {
                const Vec query = load(x + i * pitch + d);
                FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) {
                    const Vec difference = query - centre[u];
                    total[i][u] += DOT ? query * centre[u] : difference * difference;
                }
            }
        }
        FLUX_UNROLL for (int i = 0; i < QUERIES; ++i)
            FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) out[i * out_pitch + u] += sum(total[i][u]);
    }

    Buffer<double> data_, origin_;
};
