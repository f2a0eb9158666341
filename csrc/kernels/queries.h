// A block of queries of one group: their weights under a density estimate, one tile of reference points at a time.
//
// Included inside of a target's namespace. The softmax is online: sums are kept relative to the least distance so far
// and scaled when a tile has a lesser one. So no [N, M] matrix is ever materialized.

/// Least of the first n entries, n a multiple of LANES.
static double lowest_of(const double* a, int64_t n) {
    Vec low[4];
    for (auto& l : low) l = load(a);
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES)
        for (int u = 0; u < 4; ++u) low[u] = smaller(load(a + j + u * LANES), low[u]);
    for (; j < n; j += LANES) low[0] = smaller(load(a + j), low[0]);
    return lowest(smaller(smaller(low[0], low[1]), smaller(low[2], low[3])));
}

static double lowest_of(const float* a, int64_t n) {
    Floats low = broadcast(INFINITY);
    for (int64_t j = 0; j < n; j += FLOATS) low = smaller(load(a + j), low);
    return lowest(low);
}

/// w_j = factor e^{-(a_j - least) scale}, or 0 where the exponent is below -cut; returns their sum.
static double exponentials(const double* a, int64_t n, double least, double scale, double cut, double factor,
                           double* w) {
    Vec total = {};
    for (int64_t j = 0; j < n; j += LANES) {
        const Vec exponent = (least - load(a + j)) * scale;
        const Vec weight = exponent > -cut ? exponential(exponent) * factor : Vec{};
        store(w + j, weight);
        total += weight;
    }
    return sum(total);
}

/// The same for floats.
static double exponentials(const float* a, int64_t n, double least, double scale, double cut, double factor, float* w) {
    const FloatWeight weight(least, scale, cut);
    const Floats times = broadcast(static_cast<float>(factor));
    Floats total[2] = {};
    int64_t j = 0;
    for (; j + 2 * FLOATS <= n; j += 2 * FLOATS) FLUX_UNROLL for (int u = 0; u < 2; ++u) {
            const Floats here = weight(load(a + j + u * FLOATS)) * times;
            store(w + j + u * FLOATS, here);
            total[u] += here;
        }
    for (; j < n; j += FLOATS) {
        const Floats here = weight(load(a + j)) * times;
        store(w + j, here);
        total[0] += here;
    }
    return sum(total[0] + total[1]);
}

static double sum_in_double(const float* w, int64_t n) {
    Vec total = {};
    for (int64_t j = 0; j < n; j += LANES) total += widen(w + j);
    return sum(total);
}

template <class Refs>
class Queries {
public:
    /// Type of distances and weights; everything that belongs to a query is a double.
    using Number = typename Refs::Number;
    static constexpr bool IN_FLOAT = std::is_same_v<Number, float>;
    /// Whether weights depend on more than distances; then least distances are the least adjusted ones of weighting.h.
    static constexpr bool WEIGHTED = is_weighted<Refs>;

    /// Room for `most` queries of a group against one set of reference points.
    Queries(const Refs& refs, int64_t set, int64_t most, int64_t group = 0)
        : refs(refs),
          set(set),
          group(group),
          pitch(refs.pitch),
          moment_pitch(moment_pitch_of(refs)),
          columns(refs.padded < refs.tile ? refs.padded : refs.tile),
          x(most * pitch),
          moment(most * moment_pitch),
          variance(most),
          scale(most),
          least(most),
          total(most),
          begin(most),
          end(most),
          a(std::min(most, Refs::SUBBLOCK) * columns),
          w(std::min(most, Refs::SUBBLOCK) * columns),
          product(refs.product(std::min(most, Refs::SUBBLOCK), columns)),
          cut_(refs.cut()) {}

    /// Loads the points x [count, D] relative to the group's origin, and their variances [count] or one for all.
    void take(const Array& points, const Array& variances, int64_t count) {
        rows = count;
        points.load(rows, refs.D, x.get(), pitch);
        center();
        for (int64_t n = 0; n < rows; ++n) set_variance(n, variances.number(0, n));
    }
    /// The same with weights that are not of distances alone, for queries `first`, `first` + 1, ... of the group, or
    /// those of a list of their indices. No variances are those of reference points.
    void take(const Array& points, const Array& variances, int64_t count, int64_t first, const int64_t* indices) {
        rows = count;
        first_ = first;
        indices_ = indices;
        points.load(rows, refs.D, x.get(), pitch);
        center();
        for (int64_t n = 0; n < rows; ++n) {
            variance[n] = variances ? variances.number(0, n) : 1;
            scale[n] = variances ? refs.scale_of(variance[n]) : 1;
        }
    }
    void set_variance(int64_t n, double value) {
        variance[n] = value;
        scale[n] = 0.5 / value;
    }
    /// Turns raw coordinates in x into coordinates relative to the origin.
    void center() {
        for (int64_t n = 0; n < rows; ++n) {
            double* row = x.get() + n * pitch;
            for (int64_t d = 0; d < refs.D; ++d) row[d] -= refs.origin(set, d);
            std::fill(row + refs.D, row + pitch, 0.0);
        }
    }

    /// Turns coordinates relative to the origin, in rows of x or of another array, into raw ones.
    void decenter(double* from) const {
        for (int64_t n = 0; n < rows; ++n)
            for (int64_t d = 0; d < refs.D; ++d) from[n * pitch + d] += refs.origin(set, d);
    }

    /// The density estimate at every query: `least` distance, `total` of e^{-(a - least) scale}, and the displacement
    /// m - x to the mean in `moment`, unless that is not needed.
    void sweep(bool with_moments = true) {
        start();
        for (int64_t tile = 0; tile < refs.padded; tile += refs.tile)
            each_subblock(tile, [&](int64_t first, int64_t count, int64_t from, int64_t to) {
                if constexpr (IN_FLOAT)
                    if (with_moments && weigh_at_once(first, from, to)) return;
                weigh(first, count, from, to);
                if (with_moments) add_moments(first, count, from, to);
            });
        if (with_moments) finish(0, rows);
    }

    /// Calls visit(first, count, from, to) for queries first, ..., first + count - 1 and reference points [from, to).
    /// `w` then holds the weights, which sum to one over all tiles, and `a` the squared distances, both [count,
    /// `columns`], less `base`. With MEAN, `moment` holds the displacements as after `sweep`.
    template <bool MEAN, class Visit>
    void visit_weights(Visit visit) {
        start();
        if (refs.padded <= refs.tile) {  // one sweep is enough: a subblock sees all reference points at once
            each_subblock(0, [&](int64_t first, int64_t count, int64_t from, int64_t to) {
                weigh(first, count, from, to);
                if (MEAN) {
                    add_moments(first, count, from, to);
                    finish(first, count);
                }
                for (int64_t n = 0; n < count; ++n) {
                    const Number inverse = static_cast<Number>(inverse_total(first + n));
                    for (int64_t j = 0; j < to - from; ++j) w[n * columns + j] *= inverse;
                }
                visit(first, count, from, to);
            });
            return;
        }
        for (int64_t tile = 0; tile < refs.padded; tile += refs.tile)
            each_subblock(tile, [&](int64_t first, int64_t count, int64_t from, int64_t to) {
                weigh(first, count, from, to);
                if (MEAN) add_moments(first, count, from, to);
            });
        if (MEAN) finish(0, rows);
        for (int64_t tile = 0; tile < refs.padded; tile += refs.tile)
            each_subblock(tile, [&](int64_t first, int64_t count, int64_t from, int64_t to) {
                find_distances(first, count, from, to);
                for (int64_t n = 0; n < count; ++n) weights_of_row(first + n, n, from, to, inverse_total(first + n));
                visit(first, count, from, to);
            });
    }

    /// Adds to rows `out` the sums of weights times reference points, about the point that `local` refers to.
    void moments(const Number* weights, int64_t first, int64_t count, int64_t from, int64_t to, double* out) {
        if constexpr (IN_FLOAT)
            refs.moments(set, weights, at(x, first), from, to, far_, out);
        else
            refs.moments(set, weights, count, from, to, columns, out, product);
    }
    /// p_nj = v_n . r_j - less_n about the same point, for rows v; with values, of those instead of r_j.
    void dots(const double* v, int64_t first, int64_t count, int64_t from, int64_t to, const double* less, Number* p) {
        if constexpr (WEIGHTED)
            if (refs.has_values()) return refs.dots_with_values(group, v, count, from, to, far_, less, p, columns);
        if constexpr (IN_FLOAT) {
            refs.dots(set, v, at(x, first), from, to, far_, less[0], p);
        } else {
            refs.dots(set, v, count, from, to, p, columns);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t j = 0; j < to - from; ++j) p[n * columns + j] -= less[n];
        }
    }
    /// out_j += sum_n w_nj v_n for rows v [count, V].
    void outer(const Number* weights, int64_t count, int64_t from, int64_t to, const double* v, int64_t V,
               int64_t v_pitch, double* out) {
        if constexpr (IN_FLOAT)
            refs.outer(weights, from, to, v, V, out);
        else
            refs.outer(weights, count, from, to, columns, v, V, v_pitch, out, product);
    }
    /// Squared distances [count, `columns`], without what weighting.h changes in them.
    void raw_distances(int64_t first, int64_t count, int64_t from, int64_t to, Number* out) const {
        if constexpr (IN_FLOAT)
            refs.squares(set, at(x, first), from, to, out);
        else
            refs.distances(set, at(x, first), count, from, to, out, columns);
    }
    /// The mean m of query n in v . m, about that point, for a row v; with values, the mean of those.
    double along_mean(const double* v, int64_t n) const {
        double result = 0;
        if constexpr (WEIGHTED)
            if (refs.has_values()) {
                for (int64_t i = 0; i < moment_pitch; ++i) result += v[i] * moment_at(n)[i];
                return result;
            }
        for (int64_t d = 0; d < refs.D; ++d) result += v[d] * (at(moment, n)[d] + refs.local(at(x, n)[d]));
        return result;
    }

    double* at(const Buffer<double>& rows_of, int64_t n) const { return rows_of.get() + n * pitch; }
    double* moment_at(int64_t n) const { return moment.get() + n * moment_pitch; }
    bool is_far() const { return far_; }

    const Refs& refs;
    const int64_t set, group, pitch, moment_pitch, columns;
    int64_t rows = 0;
    Buffer<double> x, moment, variance, scale, least, total;
    Buffer<int64_t> begin, end;
    Buffer<Number> a, w;
    double base = 0;  // with one query per subblock: what the distances in `a` are less
    Product product;

private:
    static int64_t moment_pitch_of(const Refs& refs) {
        if constexpr (WEIGHTED)
            return refs.average_pitch();
        else
            return refs.pitch;
    }

    void start() {
        for (int64_t n = 0; n < rows; ++n) {
            if constexpr (WEIGHTED)
                refs.window(group, set, index(n), at(x, n), scale[n], begin[n], end[n]);
            else
                refs.window(set, at(x, n), scale[n], begin[n], end[n]);
            least[n] = INFINITY;
            total[n] = 0;
            std::fill_n(moment_at(n), moment_pitch, 0.0);
        }
    }
    /// Index of a query in its group.
    int64_t index(int64_t n) const { return indices_ ? indices_[first_ + n] : first_ + n; }
    /// 0 without weights, so that those that there are not stay 0.
    double inverse_total(int64_t n) const { return WEIGHTED && total[n] == 0 ? 0 : 1 / total[n]; }

    /// Calls f for subblocks of queries, each with the part [from, to) of the tile that it needs.
    template <class F>
    void each_subblock(int64_t tile, F f) {
        for (int64_t first = 0; first < rows; first += Refs::SUBBLOCK) {
            const int64_t from = std::max(tile, begin[first]),
                          to = std::min(tile + columns, std::min(end[first], refs.padded));
            if (from < to) f(first, std::min(Refs::SUBBLOCK, rows - first), from, to);
        }
    }

    void add_moments(int64_t first, int64_t count, int64_t from, int64_t to) {
        if constexpr (WEIGHTED)
            if (refs.has_values())
                return refs.average(group, w.get(), count, from, to, columns, far_, moment_at(first), product);
        moments(w.get(), first, count, from, to, at(moment, first));
    }

    /// Turns sums into means, and means of reference points into displacements from the query.
    void finish(int64_t first, int64_t count) {
        if constexpr (WEIGHTED)
            if (refs.has_values()) {
                for (int64_t n = first; n < first + count; ++n)
                    for (int64_t i = 0; i < moment_pitch; ++i) moment_at(n)[i] /= total[n];
                return;
            }
        for (int64_t n = first; n < first + count; ++n)
            for (int64_t d = 0; d < refs.D; ++d)
                at(moment, n)[d] = at(moment, n)[d] / total[n] - refs.local(at(x, n)[d]);
    }

    void find_distances(int64_t first, int64_t count, int64_t from, int64_t to) {
        if constexpr (IN_FLOAT && WEIGHTED) {
            low_ = refs.distances(group, set, index(first), at(x, first), from, to, scale[first], least[first], a.get(),
                                  base, far_);
        } else if constexpr (IN_FLOAT) {
            low_ = refs.distances(set, at(x, first), from, to, scale[first], least[first], a.get(), base, far_);
        } else {
            refs.distances(set, at(x, first), count, from, to, a.get(), columns);
            if constexpr (WEIGHTED)
                for (int64_t i = 0; i < count; ++i)
                    refs.adjust(group, set, index(first + i), scale[first + i], from, to, a.get() + i * columns);
        }
    }
    double low_of(int64_t i, int64_t from, int64_t to) const {
        if constexpr (IN_FLOAT)
            return low_;
        else
            return lowest_of(a.get() + i * columns, to - from);
    }

    /// `weigh` and `add_moments` of one query in one loop, if its weights are not needed otherwise.
    bool weigh_at_once(int64_t n, int64_t from, int64_t to) {
        if (!refs.weighs_at_once()) return false;
        find_distances(n, 1, from, to);
        if (far_) return false;
        lower(n, low_);
        if constexpr (WEIGHTED)
            total[n] += refs.weigh(group, set, at(x, n), from, to, least[n], scale[n], a.get(), moment_at(n));
        else
            total[n] += refs.weigh(set, at(x, n), from, to, least[n], scale[n], a.get(), moment_at(n));
        return true;
    }

    /// Makes `low` the least distance of query n if it is, and scales earlier sums to it.
    void lower(int64_t n, double low) {
        if (!(low < least[n])) return;  // nor if it is not a number
        const double factor = total[n] > 0 ? std::exp((low - least[n]) * scale[n]) : 0;
        total[n] *= factor;
        for (int64_t d = 0; d < moment_pitch; ++d) moment_at(n)[d] *= factor;
        least[n] = low;
    }

    /// Computes weights relative to the least distance so far, and scales earlier sums to it.
    void weigh(int64_t first, int64_t count, int64_t from, int64_t to) {
        find_distances(first, count, from, to);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t n = first + i;
            lower(n, low_of(i, from, to));
            total[n] += weights_of_row(n, i, from, to, 1);
        }
    }

    double weights_of_row(int64_t n, int64_t i, int64_t from, int64_t to, double factor) {
        Number* row = w.get() + i * columns;
        double result = exponentials(a.get() + i * columns, to - from, least[n] - base, scale[n], cut_, factor, row);
        if constexpr (IN_FLOAT)
            if (far_) result = sum_in_double(row, to - from);
        for (int64_t j = std::max(refs.M, from); j < to; ++j) {  // padding: copies of the last reference point
            result -= row[j - from];
            row[j - from] = 0;
        }
        return result;
    }

    double cut_;
    int64_t first_ = 0;  // place of the first query in its group
    const int64_t* indices_ = nullptr;
    double low_ = 0;    // with one query per subblock: the least distance of the last tile,
    bool far_ = false;  // and whether its sums are taken in double
};
