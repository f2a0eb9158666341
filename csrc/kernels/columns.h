// Layout of reference points in few dimensions; see refs.h.
//
// Included inside of a target's namespace.

/// Few dimensions: one array per coordinate, vectors run over reference points.
///
/// Where a group is wide compared with the bandwidth, its reference points are put into equal cells along its widest
/// coordinate, in the order of the cells. A query then needs only the window of reference points whose weight can be
/// above rounding, which a bound on that coordinate proves.
class Columns {
public:
    static constexpr int64_t MOST_DIMENSIONS = 24;
    static constexpr int64_t BLOCK = 32;  // queries in a block: enough to fill the vectors of the random numbers
    static constexpr int64_t SUBBLOCK = 1;

    Columns(const Source& source, int threads)
        : M(source.count),
          D(source.dimensions),
          padded(round_up(M, 8)),
          tile(std::clamp<int64_t>(4096 / D / 8 * 8, 128, 1024)),
          pitch(D),
          stride_(odd_lines(M)),
          data_(source.sets * D * stride_),
          origin_(source.sets * D),
          order_(source.sets * M),
          cells_(source.sets),
          first_(source.sets * (M + 1)),
          cut_(log_of_least_weight(M)) {
        parallel_for(source.sets, threads, [&](int64_t set) { pack(source, set); });
    }

    int64_t outer_size(int64_t V) const { return V * stride_; }
    Product product(int64_t, int64_t) const { return Product(0, 0); }
    const double* origin(int64_t set) const { return origin_.get() + set * D; }

    double cut() const { return cut_; }

    /// Finds the reference points that can matter to a query: [begin, end), multiples of LANES.
    void window(int64_t set, const double* x, double scale, int64_t& begin, int64_t& end) const {
        begin = 0;
        end = padded;
        const Cells& cells = cells_[set];
        if (cells.coordinate < 0) return;
        const double at = x[cells.coordinate];
        const int32_t* first = first_.get() + set * (M + 1);
        // The distance to the nearest of a few reference points bounds that to the nearest of all.
        const int64_t near = std::min<int64_t>(first[cell(cells, at)], M - 1) / LANES * LANES;
        double a[LANES];
        pairs<false, 1>(data_.get() + set * D * stride_ + near, x, a);
        const double reach = std::sqrt(lowest(load(a)) + cut() / scale);
        begin = std::min<int64_t>(first[cell(cells, at - reach)], M - 1) / LANES * LANES;
        end = std::max(round_up(first[cell(cells, at + reach) + 1], LANES), begin + LANES);
    }

    void distances(int64_t set, const double* x, int64_t, int64_t begin, int64_t end, double* a, int64_t) const {
        each_pair<false>(set, x, begin, end, a);
    }
    void dots(int64_t set, const double* v, int64_t, int64_t begin, int64_t end, double* p, int64_t) const {
        each_pair<true>(set, v, begin, end, p);
    }

    void moments(int64_t set, const double* w, int64_t, int64_t begin, int64_t end, int64_t, double* out,
                 Product&) const {
        const double* r = data_.get() + set * D * stride_ + begin;
        int64_t d = 0;
        for (; d + 4 <= D; d += 4) moment<4, 2>(r + d * stride_, w, end - begin, out + d);
        for (; d + 2 <= D; d += 2) moment<2, 4>(r + d * stride_, w, end - begin, out + d);
        for (; d < D; ++d) moment<1, 8>(r + d * stride_, w, end - begin, out + d);
    }

    /// `out` is [V, stride].
    void outer(const double* w, int64_t, int64_t begin, int64_t end, int64_t, const double* v, int64_t V, int64_t,
               double* out, Product&) const {
        for (int64_t i = 0; i < V; ++i) {
            double* to = out + i * stride_ + begin;
            for (int64_t j = 0; j < end - begin; j += LANES) store(to + j, load(to + j) + load(w + j) * v[i]);
        }
    }

    /// Row `place` of an `outer` result, and the coordinates of the reference point at that place.
    void collect(const double* outer, int64_t place, int64_t V, double* row) const {
        for (int64_t i = 0; i < V; ++i) row[i] = outer[i * stride_ + place];
    }
    void coordinates(int64_t set, int64_t place, double* row) const {
        for (int64_t d = 0; d < D; ++d) row[d] = data_[(set * D + d) * stride_ + place];
    }
    /// Index in the source of the reference point at a place.
    int64_t source_index(int64_t set, int64_t place) const { return order_[set * M + place]; }

    const int64_t M, D, padded, tile, pitch;

private:
    void pack(const Source& source, int64_t set) {
        Buffer<double> rows(M * D);
        double* origin = origin_.get() + set * D;
        source.read(set, 0, D, rows.get(), D);
        Cells& cells = cells_[set] = {-1, 0, 0};
        double range = 0;
        bool finite = true;
        for (int64_t d = 0; d < D; ++d) {
            double total = 0;
            for (int64_t j = 0; j < M; ++j) total += rows[j * D + d];
            origin[d] = total / M;
            // Numbers that are not finite (a compiled graph passes them unchecked) have no order.
            finite = finite && std::isfinite(total);
            for (int64_t j = 0; j < M; ++j) rows[j * D + d] -= origin[d];
        }
        if (source.move) source.move(set, 0, D, rows.get(), D);
        for (int64_t d = 0; d < D; ++d) {
            double least = INFINITY, most = -INFINITY;
            for (int64_t j = 0; j < M; ++j) {
                least = std::min(least, rows[j * D + d]);
                most = std::max(most, rows[j * D + d]);
            }
            finite = finite && std::isfinite(most - least);
            if (most - least > range) {
                range = most - least;
                cells = {static_cast<int32_t>(d), least, M / range};
            }
        }
        // Windows pay off if one leaves out half of the range; it is 2 sqrt(2 cut) sigma wide for a query in the
        // middle.
        if (!finite || M < 64 || range < 4 * std::sqrt(2 * source.widest(set) * cut())) cells.coordinate = -1;
        int32_t* order = order_.get() + set * M;
        sort(cells, rows.get(), order, first_.get() + set * (M + 1));
        for (int64_t d = 0; d < D; ++d) {
            double* to = data_.get() + (set * D + d) * stride_;
            for (int64_t j = 0; j < M; ++j) to[j] = rows[order[j] * D + d];
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

    /// Fills `order` with the reference points cell by cell, and `first` with the first place of each cell.
    void sort(const Cells& cells, const double* rows, int32_t* order, int32_t* first) const {
        if (cells.coordinate < 0) {
            for (int64_t j = 0; j < M; ++j) order[j] = static_cast<int32_t>(j);
            return;
        }
        const int64_t d = cells.coordinate;
        Buffer<int32_t> where(M);
        std::fill_n(first, M + 1, 0);
        for (int64_t j = 0; j < M; ++j) {
            where[j] = static_cast<int32_t>(cell(cells, rows[j * D + d]));
            ++first[where[j] + 1];
        }
        for (int64_t c = 0; c < M; ++c) first[c + 1] += first[c];
        for (int64_t j = 0; j < M; ++j) order[first[where[j]]++] = static_cast<int32_t>(j);
        // Each entry is now at the end of its cell, where the next cell begins.
        std::copy_backward(first, first + M, first + M + 1);
        first[0] = 0;
    }

    template <bool DOT>
    void each_pair(int64_t set, const double* x, int64_t begin, int64_t end, double* out) const {
        const double* r = data_.get() + set * D * stride_;
        int64_t j = begin;
        for (; j + 8 * LANES <= end; j += 8 * LANES) pairs<DOT, 8>(r + j, x, out + j - begin);
        for (; j < end; j += LANES) pairs<DOT, 1>(r + j, x, out + j - begin);
    }
    template <bool DOT, int UNROLL>
    void pairs(const double* r, const double* x, double* out) const {
        Vec total[UNROLL] = {};
        for (int64_t d = 0; d < D; ++d) FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
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
        for (; j + UNROLL * LANES <= n; j += UNROLL * LANES) FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
                const Vec weight = load(w + j + u * LANES);
                FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) total[i][u] +=
                    weight * load(r + i * stride_ + j + u * LANES);
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
    double cut_;
};
