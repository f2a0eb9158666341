// Layout of reference points in few dimensions, in float; see refs.h.
//
// Included inside of a target's namespace.

/// Few dimensions in float: one array per coordinate, vectors run over reference points, in the order of their cells.
///
/// Coordinates stay as they are given, so that differences of neighbors are exact. What a query, or a reference point
/// that was computed, has beyond float is its low part, which the differences include. Sums of a tile are taken about
/// the query's high part, so that nothing cancels, and added up in double. A query far from all reference points has
/// its differences, distances and sums taken in double: one with a least squared distance above 2 FAR sigma^2, whose
/// weights would lose digits, or above the squared diameter of the reference points, whose mean would.
class FloatColumns {
public:
    using Number = float;
    static constexpr int64_t BLOCK = 32;
    static constexpr int64_t SUBBLOCK = 1;
    static constexpr double FAR = 64;

    /// `more`: numbers per reference point that are used beside its coordinates.
    FloatColumns(const Source& source, int threads, int64_t more = 0)
        : M(source.count),
          D(source.dimensions),
          padded(round_up(M, FLOATS)),
          tile(std::clamp<int64_t>((more ? 6144 : 8192) / (D + more) / FLOATS * FLOATS, 256, more ? 1024 : 2048)),
          pitch(D),
          has_low_(static_cast<bool>(source.move)),
          stride_(2 * odd_lines((padded + 1) / 2)),
          data_(source.sets * D * stride_),
          low_(has_low_ ? source.sets * D * stride_ : 1),
          order_(source.sets * M),
          cells_(source.sets),
          first_(source.sets * (M + 1)),
          cut_(25 + std::log(static_cast<double>(M))) {
        parallel_for(source.sets, threads, [&](int64_t set) { pack(source, set); });
    }

    int64_t outer_size(int64_t V) const { return V * stride_; }
    Product product(int64_t, int64_t) const { return Product(0, 0); }
    double origin(int64_t, int64_t) const { return 0; }
    /// Coordinate of a query about the point that sums are taken about.
    static double local(double x) { return x - static_cast<float>(x); }
    double cut() const { return cut_; }

    /// Finds the reference points that can matter to a query: [begin, end), multiples of FLOATS.
    void window(int64_t set, const double* x, double scale, int64_t& begin, int64_t& end) const {
        window(
            set, x, [&](const float* a, int64_t) { return std::sqrt(lowest(load(a)) * 1.00001 + cut() / scale); },
            begin, end);
    }
    /// The same, if those at a distance above reach(squared distances of a few, their place) cannot matter.
    template <class Reach>
    void window(int64_t set, const double* x, Reach reach, int64_t& begin, int64_t& end) const {
        const auto reach_at = [&](int64_t place) {
            float a[FLOATS];
            near_distances(set, Split(x, D), place, place + FLOATS, a);
            return reach(a, place);
        };
        cells_[set].window(x, FLOATS, padded, reach_at, begin, end);
    }

    /// Squared distances less `base` for reference points [begin, end); returns the least of them. `least` is that of
    /// earlier tiles.
    double distances(int64_t set, const double* x, int64_t begin, int64_t end, double scale, double least, float* a,
                     double& base, bool& far) const {
        const double here = near_distances(set, Split(x, D), begin, end, a);
        base = 0;
        far = std::min(here, least) > std::min(FAR / scale, cells_[set].diameter);
        if (!far) return here;
        double exact[MOST_IN_TILE];
        base = far_distances(set, x, begin, end, exact);
        narrow_differences(exact, end - begin, base, a);
        return base;
    }

    /// Weights as `exponentials`; returns their sum, and adds to `moment` their sums times the reference points.
    double weigh(int64_t set, const double* x, int64_t begin, int64_t end, double least, double scale, const float* a,
                 double* moment) const {
        return weigh_columns(data(set) + begin, D, x, end - begin, least, scale, a, moment);
    }
    /// Whether `weigh` takes this number of dimensions; more sums do not fit into the registers beside an exponential.
    bool weighs_at_once() const { return D <= MOST_AT_ONCE; }

    /// out_d += sum_j w_j (r_jd - x_d), about the high part of x.
    void moments(int64_t set, const float* w, const double* x, int64_t begin, int64_t end, bool far,
                 double* out) const {
        add_sums(data(set) + begin, D, w, x, end - begin, far, out);
    }

    /// p_j = v . (r_j - x) - less, about the high part of x.
    void dots(int64_t set, const double* v, const double* x, int64_t begin, int64_t end, bool far, double less,
              float* p) const {
        dots_of(data(set) + begin, D, v, x, end - begin, far, less, p);
    }

    /// out_j += w_j v; `out` is [V, stride], in double.
    void outer(const float* w, int64_t begin, int64_t end, const double* v, int64_t V, double* out) const {
        for (int64_t i = 0; i < V; ++i) {
            double* to = out + i * stride_ + begin;
            for (int64_t j = 0; j < end - begin; j += LANES) store(to + j, load(to + j) + widen(w + j) * v[i]);
        }
    }

    class Outer;

    void collect(const double* outer, int64_t place, int64_t V, double* row) const {
        for (int64_t i = 0; i < V; ++i) row[i] = outer[i * stride_ + place];
    }
    void coordinates(int64_t set, int64_t place, double* row) const {
        for (int64_t d = 0; d < D; ++d) {
            row[d] = data(set)[d * stride_ + place];
            if (has_low_) row[d] += low(set)[d * stride_ + place];
        }
    }
    int64_t source_index(int64_t set, int64_t place) const { return order_[set * M + place]; }

    const int64_t M, D, padded, tile, pitch;

protected:
    static constexpr int64_t MOST_IN_TILE = 2048, MOST_AT_ONCE = 3;

    /// Numbers [M, V] of the reference points of a set, in their order: [V, stride], as their coordinates lie.
    int64_t values_size(int64_t V) const { return V * stride_; }
    void pack_values(int64_t set, const Array& from, int64_t V, float* out) const {
        Buffer<double> rows(M * V);
        from.load(M, V, rows.get(), V);
        for (int64_t i = 0; i < V; ++i) {
            for (int64_t j = 0; j < M; ++j)
                out[i * stride_ + j] = static_cast<float>(rows[order_[set * M + j] * V + i]);
            std::fill(out + i * stride_ + M, out + i * stride_ + padded, 0.0f);
        }
    }
    /// Whether a query is farther from a reference point than any two of those are from each other, so that their mean
    /// would lose digits.
    bool is_outside(int64_t set, const double* x, int64_t place) const {
        double square = 0;
        for (int64_t d = 0; d < D; ++d) {
            const double difference = data(set)[d * stride_ + place] - x[d];
            square += difference * difference;
        }
        return square > cells_[set].diameter;
    }

    // Farther than any reference point, so that the weight is 0, and its square is finite.
    static constexpr float PADDING = 1e17f;

    /// A query as the sum of two floats per coordinate.
    struct Split {
        Split(const double* x, int64_t D) {
            for (int64_t d = 0; d < D; ++d) {
                high[d] = static_cast<float>(x[d]);
                low[d] = static_cast<float>(x[d] - high[d]);
                exact = exact && low[d] == 0;
            }
        }
        float high[Columns::MOST_DIMENSIONS], low[Columns::MOST_DIMENSIONS];
        bool exact = true;
    };

    const float* data(int64_t set) const { return data_.get() + set * D * stride_; }
    const float* low(int64_t set) const { return low_.get() + set * D * stride_; }

    void pack(const Source& source, int64_t set) {
        Buffer<double> rows(M * D);
        source.read(set, 0, D, rows.get(), D);
        if (source.move) source.move(set, 0, D, rows.get(), D);
        int32_t* order = order_.get() + set * M;
        cells_[set] = {};
        cells_[set].sort(rows.get(), M, D, true, source.reach(set, cut()), order, first_.get() + set * (M + 1));
        for (int64_t d = 0; d < D; ++d) {
            float* high = data_.get() + (set * D + d) * stride_;
            for (int64_t j = 0; j < M; ++j) high[j] = static_cast<float>(rows[order[j] * D + d]);
            std::fill(high + M, high + padded, PADDING);
            if (!has_low_) continue;
            float* low = low_.get() + (set * D + d) * stride_;
            for (int64_t j = 0; j < M; ++j) low[j] = static_cast<float>(rows[order[j] * D + d] - high[j]);
            std::fill(low + M, low + padded, 0.0f);
        }
    }

    /// What squared distances are reduced by: a number of each reference point times one factor.
    struct Reduction {
        const float* numbers;
        float factor;
    };
    double near_distances(int64_t set, const Split& x, int64_t begin, int64_t end, float* a,
                          Reduction reduction = {nullptr, 0}) const {
        const float *r = data(set) + begin, *beyond = low(set) + (has_low_ ? begin : 0);
        const auto by_dimension = [&](auto parts) {
            constexpr int PARTS = decltype(parts)::value;
            switch (D) {
                case 1:
                    return distances_of<1, PARTS>(r, beyond, x, reduction, end - begin, a);
                case 2:
                    return distances_of<2, PARTS>(r, beyond, x, reduction, end - begin, a);
                case 3:
                    return distances_of<3, PARTS>(r, beyond, x, reduction, end - begin, a);
                default:
                    return distances_of<0, PARTS>(r, beyond, x, reduction, end - begin, a);
            }
        };
        if (has_low_) return by_dimension(std::integral_constant<int, 2>{});
        if (reduction.numbers) return by_dimension(std::integral_constant<int, 3>{});
        if (x.exact) return by_dimension(std::integral_constant<int, 0>{});
        return by_dimension(std::integral_constant<int, 1>{});
    }
    /// DIMENSIONS 0 is any number. PARTS: 0 no low parts, 1 those of the query, 2 those of the reference points, which
    /// only queries in float meet; 3 none, and reduced distances.
    template <int DIMENSIONS, int PARTS>
    double distances_of(const float* r, const float* beyond, const Split& x, Reduction reduction, int64_t n,
                        float* a) const {
        Floats least = broadcast(INFINITY);
        int64_t j = 0;
        for (; j + 8 * FLOATS <= n; j += 8 * FLOATS)
            pairs<DIMENSIONS, PARTS, 8>(r + j, beyond + j, x, reduction, j, a + j, least);
        for (; j < n; j += FLOATS) pairs<DIMENSIONS, PARTS, 1>(r + j, beyond + j, x, reduction, j, a + j, least);
        return lowest(least);
    }
    template <int DIMENSIONS, int PARTS, int UNROLL>
    __attribute__((always_inline)) void pairs(const float* r, const float* beyond, const Split& x, Reduction reduction,
                                              int64_t first, float* a, Floats& least) const {
        Floats total[UNROLL] = {};
        for (int64_t d = 0; d < (DIMENSIONS ? DIMENSIONS : D); ++d) FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
                Floats difference = load(r + d * stride_ + u * FLOATS) - x.high[d];
                if (PARTS == 1) difference -= x.low[d];
                if (PARTS == 2) difference += load(beyond + d * stride_ + u * FLOATS);
                total[u] += difference * difference;
            }
        FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
            if (PARTS == 3) total[u] -= load(reduction.numbers + first + u * FLOATS) * reduction.factor;
            store(a + u * FLOATS, total[u]);
            least = smaller(total[u], least);
        }
    }

    /// Squared distances in double; returns the least.
    double far_distances(int64_t set, const double* x, int64_t begin, int64_t end, double* exact) const {
        const float *r = data(set) + begin, *beyond = low(set) + (has_low_ ? begin : 0);
        Vec least = broadcast(static_cast<double>(INFINITY));
        for (int64_t j = 0; j < end - begin; j += LANES) {
            Vec total = {};
            for (int64_t d = 0; d < D; ++d) {
                Vec difference = widen(r + d * stride_ + j) - x[d];
                if (has_low_) difference += widen(beyond + d * stride_ + j);
                total += difference * difference;
            }
            store(exact + j, total);
            least = smaller(total, least);
        }
        return lowest(least);
    }
    static void narrow_differences(const double* exact, int64_t n, double base, float* a) {
        for (int64_t j = 0; j < n; ++j) a[j] = static_cast<float>(exact[j] - base);
    }

    /// `weigh` for sums of the numbers of up to MOST_AT_ONCE arrays, about x.
    double weigh_columns(const float* r, int64_t count, const double* x, int64_t n, double least, double scale,
                         const float* a, double* moment) const {
        switch (count) {
            case 1:
                return weigh_of<1>(r, x, n, least, scale, a, moment);
            case 2:
                return weigh_of<2>(r, x, n, least, scale, a, moment);
            default:
                return weigh_of<3>(r, x, n, least, scale, a, moment);
        }
    }

    /// `moments` for the numbers of `count` arrays.
    void add_sums(const float* r, int64_t count, const float* w, const double* x, int64_t n, bool far,
                  double* out) const {
        int64_t d = 0;
        if (far)
            for (; d < count; ++d) out[d] += far_moment(r + d * stride_, w, n, static_cast<float>(x[d]));
        for (; d + 4 <= count; d += 4) moment<4, 2>(r + d * stride_, w, x + d, n, out + d);
        for (; d + 2 <= count; d += 2) moment<2, 4>(r + d * stride_, w, x + d, n, out + d);
        for (; d < count; ++d) moment<1, 4>(r + d * stride_, w, x + d, n, out + d);
    }

    /// `dots` for the numbers of `count` arrays.
    void dots_of(const float* r, int64_t count, const double* v, const double* x, int64_t n, bool far, double less,
                 float* p) const {
        if (far) {
            for (int64_t j = 0; j < n; j += LANES) {
                Vec total = broadcast(-less);
                for (int64_t d = 0; d < count; ++d) total += (widen(r + d * stride_ + j) - double(float(x[d]))) * v[d];
                narrow(p + j, total);
            }
            return;
        }
        for (int64_t j = 0; j < n; j += FLOATS) {
            Floats total = broadcast(static_cast<float>(-less));
            for (int64_t d = 0; d < count; ++d) total += (load(r + d * stride_ + j) - float(x[d])) * float(v[d]);
            store(p + j, total);
        }
    }

private:
    template <int DIMENSIONS>
    double weigh_of(const float* r, const double* x, int64_t n, double least, double scale, const float* a,
                    double* out) const {
        const FloatWeight weight(least, scale, cut_);
        Floats total = {}, moment[DIMENSIONS] = {}, at[DIMENSIONS];
        FLUX_UNROLL for (int d = 0; d < DIMENSIONS; ++d) at[d] = broadcast(static_cast<float>(x[d]));
        for (int64_t j = 0; j < n; j += FLOATS) {
            const Floats w = weight(load(a + j));
            total += w;
            FLUX_UNROLL for (int d = 0; d < DIMENSIONS; ++d) moment[d] += w * (load(r + d * stride_ + j) - at[d]);
        }
        FLUX_UNROLL for (int d = 0; d < DIMENSIONS; ++d) out[d] += sum(moment[d]);
        return sum(total);
    }

    template <int COORDINATES, int UNROLL>
    void moment(const float* r, const float* w, const double* x, int64_t n, double* out) const {
        Floats total[COORDINATES][UNROLL] = {}, at[COORDINATES];
        FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) at[i] = broadcast(static_cast<float>(x[i]));
        int64_t j = 0;
        for (; j + UNROLL * FLOATS <= n; j += UNROLL * FLOATS) FLUX_UNROLL for (int u = 0; u < UNROLL; ++u) {
                const Floats weight = load(w + j + u * FLOATS);
                FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) total[i][u] +=
                    weight * (load(r + i * stride_ + j + u * FLOATS) - at[i]);
            }
        for (; j < n; j += FLOATS)
            FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) total[i][0] +=
                load(w + j) * (load(r + i * stride_ + j) - at[i]);
        FLUX_UNROLL for (int i = 0; i < COORDINATES; ++i) {
            FLUX_UNROLL for (int u = 1; u < UNROLL; ++u) total[i][0] += total[i][u];
            out[i] += sum(total[i][0]);
        }
    }
    static double far_moment(const float* r, const float* w, int64_t n, double x) {
        Vec total = {};
        for (int64_t j = 0; j < n; j += LANES) total += widen(w + j) * (widen(r + j) - x);
        return sum(total);
    }

    const bool has_low_;
    const int64_t stride_;  // between coordinates
    Buffer<float> data_, low_;
    Buffer<int32_t> order_;
    Buffer<Cells> cells_;
    Buffer<int32_t> first_;
    double cut_;
};

/// Sums out_j += w_nj v_n over the queries n of one task, in float for RUN queries, which are then added to doubles.
/// TOGETHER queries at a time, so that sums are read and written once for all of them.
class FloatColumns::Outer {
public:
    Outer(const FloatColumns& refs, int64_t V, double* sums)
        : V_(V),
          stride_(refs.stride_),
          tile_(refs.tile),
          sums_(sums),
          run_(V * refs.stride_),
          w_(TOGETHER * refs.tile),
          v_(TOGETHER * V) {
        std::fill_n(run_.get(), V * stride_, 0.0f);
    }

    /// Adds a query with weights w for reference points [from, to), which lie in one tile, and values v.
    void add(const float* w, int64_t from, int64_t to, const double* v) {
        if (count_ == TOGETHER || (count_ > 0 && from / tile_ != tile_index_)) add_together();
        if (queries_ == RUN) flush();
        if (count_ == 0) {
            tile_index_ = from / tile_;
            from_ = from;
            to_ = to;
        }
        from_ = std::min(from_, from);
        to_ = std::max(to_, to);
        begin_[count_] = from;
        end_[count_] = to;
        std::copy_n(w, to - from, w_.get() + count_ * tile_ + from - tile_index_ * tile_);
        for (int64_t i = 0; i < V_; ++i) v_[i * TOGETHER + count_] = static_cast<float>(v[i]);
        ++count_;
        ++queries_;
    }
    void flush() {
        add_together();
        for (int64_t i = 0; i < V_ * stride_; ++i) sums_[i] += run_[i];
        std::fill_n(run_.get(), V_ * stride_, 0.0f);
        queries_ = 0;
    }

private:
    static constexpr int TOGETHER = 4;
    static constexpr int64_t RUN = 64;

    void add_together() {
        for (int n = 0; n < TOGETHER; ++n) {  // zero outside of a query's window, and for missing queries
            float* row = w_.get() + n * tile_;
            const int64_t start = tile_index_ * tile_;
            const bool missing = n >= count_;
            std::fill(row + from_ - start, row + (missing ? to_ : begin_[n]) - start, 0.0f);
            if (!missing) std::fill(row + end_[n] - start, row + to_ - start, 0.0f);
            for (int64_t i = 0; missing && i < V_; ++i) v_[i * TOGETHER + n] = 0;
        }
        int64_t i = 0;
        for (; i + 2 <= V_; i += 2) add_values<2>(i);
        for (; i < V_; ++i) add_values<1>(i);
        count_ = 0;
    }
    template <int VALUES>
    void add_values(int64_t first) {
        const int64_t start = tile_index_ * tile_;
        float* out = run_.get() + first * stride_ + start;
        Floats v[VALUES][TOGETHER];
        FLUX_UNROLL for (int i = 0; i < VALUES; ++i) FLUX_UNROLL for (int n = 0; n < TOGETHER; ++n) v[i][n] =
            broadcast(v_[(first + i) * TOGETHER + n]);
        for (int64_t j = from_ - start; j < to_ - start; j += FLOATS) {
            Floats total[VALUES];
            FLUX_UNROLL for (int i = 0; i < VALUES; ++i) total[i] = load(out + i * stride_ + j);
            FLUX_UNROLL for (int n = 0; n < TOGETHER; ++n) {
                const Floats weight = load(w_.get() + n * tile_ + j);
                FLUX_UNROLL for (int i = 0; i < VALUES; ++i) total[i] += weight * v[i][n];
            }
            FLUX_UNROLL for (int i = 0; i < VALUES; ++i) store(out + i * stride_ + j, total[i]);
        }
    }

    const int64_t V_, stride_, tile_;
    double* sums_;
    Buffer<float> run_, w_, v_;
    int count_ = 0;        // queries that wait, with weights in w_
    int64_t queries_ = 0;  // those in run_
    int64_t tile_index_ = 0, from_ = 0, to_ = 0, begin_[TOGETHER] = {}, end_[TOGETHER] = {};
};
