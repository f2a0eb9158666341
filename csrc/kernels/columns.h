// Layout of reference points in few dimensions; see refs.h.
//
// Included inside of a target's namespace.

/// Few dimensions: one array per coordinate, vectors run over reference points, in the order of their cells.
class Columns {
public:
    using Number = double;
    static constexpr int64_t MOST_DIMENSIONS = 24;
    static constexpr int64_t BLOCK = 32;  // queries in a block: enough to fill the vectors of the random numbers
    static constexpr int64_t SUBBLOCK = 1;

    /// `more`: numbers per reference point that are used beside its coordinates.
    Columns(const Source& source, int threads, int64_t more = 0)
        : M(source.count),
          D(source.dimensions),
          padded(round_up(M, 8)),
          tile(std::clamp<int64_t>(4096 / (D + more) / 8 * 8, 128, 1024)),
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
    double origin(int64_t set, int64_t d) const { return origin_[set * D + d]; }
    static double local(double x) { return x; }

    double cut() const { return cut_; }

    /// Finds the reference points that can matter to a query: [begin, end), multiples of LANES.
    void window(int64_t set, const double* x, double scale, int64_t& begin, int64_t& end) const {
        window(
            set, x, [&](const double* a, int64_t) { return std::sqrt(lowest(load(a)) + cut() / scale); }, begin, end);
    }
    /// The same, if those at a distance above reach(squared distances of a few, their place) cannot matter.
    template <class Reach>
    void window(int64_t set, const double* x, Reach reach, int64_t& begin, int64_t& end) const {
        const auto reach_at = [&](int64_t place) {
            double a[LANES];
            pairs<false, 1>(data_.get() + set * D * stride_ + place, x, a);
            return reach(a, place);
        };
        cells_[set].window(x, LANES, padded, reach_at, begin, end);
    }

    void distances(int64_t set, const double* x, int64_t, int64_t begin, int64_t end, double* a, int64_t) const {
        each_pair<false>(set, x, begin, end, a);
    }
    void dots(int64_t set, const double* v, int64_t, int64_t begin, int64_t end, double* p, int64_t) const {
        each_pair<true>(set, v, begin, end, p);
    }

    void moments(int64_t set, const double* w, int64_t, int64_t begin, int64_t end, int64_t, double* out,
                 Product&) const {
        add_sums(data_.get() + set * D * stride_ + begin, D, w, end - begin, out);
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

protected:
    /// Numbers [M, V] of the reference points of a set, in their order: [V, stride], as their coordinates lie.
    int64_t values_size(int64_t V) const { return V * stride_; }
    void pack_values(int64_t set, const Array& from, int64_t V, double* out) const {
        Buffer<double> rows(M * V);
        from.load(M, V, rows.get(), V);
        for (int64_t i = 0; i < V; ++i) {
            for (int64_t j = 0; j < M; ++j) out[i * stride_ + j] = rows[order_[set * M + j] * V + i];
            std::fill(out + i * stride_ + M, out + i * stride_ + padded, 0.0);
        }
    }
    /// out += sum_j w_j values_j
    void value_sums(const double* values, int64_t V, const double* w, int64_t, int64_t begin, int64_t end, int64_t,
                    double* out, int64_t, Product&) const {
        add_sums(values + begin, V, w, end - begin, out);
    }
    /// p_j = v . values_j
    void value_dots(const double* values, int64_t V, const double* v, int64_t, int64_t begin, int64_t end, int64_t,
                    double* p, int64_t) const {
        for (int64_t j = 0; j < end - begin; j += LANES) {
            Vec total = {};
            for (int64_t i = 0; i < V; ++i) total += load(values + i * stride_ + begin + j) * v[i];
            store(p + j, total);
        }
    }

private:
    /// out_d += sum_j w_j r_jd for `count` arrays of numbers, one per coordinate.
    void add_sums(const double* r, int64_t count, const double* w, int64_t n, double* out) const {
        int64_t d = 0;
        for (; d + 4 <= count; d += 4) moment<4, 2>(r + d * stride_, w, n, out + d);
        for (; d + 2 <= count; d += 2) moment<2, 4>(r + d * stride_, w, n, out + d);
        for (; d < count; ++d) moment<1, 8>(r + d * stride_, w, n, out + d);
    }

    void pack(const Source& source, int64_t set) {
        Buffer<double> rows(M * D);
        double* origin = origin_.get() + set * D;
        source.read(set, 0, D, rows.get(), D);
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
        int32_t* order = order_.get() + set * M;
        cells_[set] = {};
        cells_[set].sort(rows.get(), M, D, finite, source.reach(set, cut()), order, first_.get() + set * (M + 1));
        for (int64_t d = 0; d < D; ++d) {
            double* to = data_.get() + (set * D + d) * stride_;
            for (int64_t j = 0; j < M; ++j) to[j] = rows[order[j] * D + d];
            std::fill(to + M, to + padded, to[M - 1]);  // their weights are set to 0 by the callers
        }
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
