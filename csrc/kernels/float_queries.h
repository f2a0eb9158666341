// A block of queries of one group in many dimensions: their weights in float32, one tile of reference points at a time.
//
// Included inside of a target's namespace. As in queries.h no [N, M] matrix is materialized. Logits come from inner
// products in float32 and are as good as those. Where that matters they are computed again from exact differences:
//   - at most FEW reference points of a tile have a weight above rounding: all of those;
//   - else the error of the products is measured on a sample. A query whose logits may be off by more than TOLERANCE is
//     rejected: an op computes it in float64 instead, with the kernels of rows.h.

class FloatQueries {
public:
    // Of a logit, in nats; errors of most are far smaller. Means average over the errors of many.
    static constexpr double TOLERANCE = 1.2e-5, TOLERANCE_OF_MEANS = 4e-5;

    struct Query {
        double variance, scale;  // scale: log2(e)/2 sigma^2, so that weights are powers of two
        double norm;             // |x|^2 about the origin
        double top;              // largest logit so far, that of the head: y = (2 x.r - |r|^2) scale
        double rest, share;      // sum of the other weights relative to the head's; part that came by a product
        double bound;            // estimate of the largest error of a logit, in nats
        double nearest;          // with weighting: least squared distance of those found by products
        int64_t head;
        bool rejected;
        // Of the present tile:
        double best, limit, widest, added;  // added: sum of the weights in `w`
        int64_t at, live;
    };

    FloatQueries(const FloatRows& refs, int64_t set, int64_t most, bool mean, const FloatWeighting* weighting = nullptr)
        : refs(refs),
          set(set),
          columns(refs.tile),
          x(most, refs.D),
          sum(mean ? most : 0, weighting ? weighting->width : refs.D),
          query(most),
          logit(most * columns),
          w(most * columns),
          product(most),
          weighting_(weighting),
          exact_(2 * round_up(refs.D, 8)),
          cut_(log_of_least_weight(refs.M) * LOG2_E) {
        std::fill_n(exact_.get(), 2 * round_up(refs.D, 8), 0.0);
    }

    void set_variance(int64_t n, double variance) {
        query[n].variance = variance;
        query[n].scale = 0.5 * LOG2_E / variance;
    }
    /// Loads points, their variances being set.
    void take(const Points& points, int64_t count) {
        given_ = points;
        is_given_ = true;
        rows = count;
        for (int64_t n = 0; n < rows; ++n) {
            query[n].norm = 0;
            for (int64_t p = 0; p < x.count; ++p) query[n].norm += x.center(points, n, p, refs.origin(set), n);
        }
    }
    void take(const Points& points, const Array& variances, int64_t count) {
        for (int64_t n = 0; n < count; ++n) set_variance(n, variances.number(0, n));
        take(points, count);
    }
    /// Loads points with a weighting, their variances or none, and their indices in the group.
    void take(const Points& points, const Array& variances, int64_t count, int64_t first, const int64_t* indices) {
        for (int64_t n = 0; n < count; ++n) {
            query[n].variance = variances ? variances.number(0, n) : 1;
            query[n].scale = LOG2_E * (variances ? weighting_->scale_of(query[n].variance) : 1);
        }
        first_ = first;
        indices_ = indices;
        take(points, count);
    }
    /// The centered coordinates in x have changed: from now on they are the points.
    void moved() {
        is_given_ = false;
        for (int64_t n = 0; n < rows; ++n) {
            query[n].norm = 0;
            for (int64_t p = 0; p < x.count; ++p) query[n].norm += x.square(n, p);
        }
    }

    /// The density estimate at every query: `top`, `rest` and, with `mean`, in `sum` the part of the mean that
    /// `displace` needs.
    void sweep(bool mean) {
        tolerance_ = TOLERANCE_OF_MEANS;
        start(mean);
        for (int64_t from = 0; from < refs.padded; from += columns) {
            const int64_t to = std::min(from + columns, refs.padded);
            weigh(from, to, mean);
            if (!mean) continue;
            if (averages_values())
                product.add(w.get(), columns, 1, rows, to - from, weighting_->values, from, sum, 0);
            else
                add_products(w.get(), from, to, sum);
        }
        for (int64_t n = 0; n < rows; ++n) query[n].rejected |= query[n].head < 0;
    }

    /// Calls visit(from, to) for tiles of reference points. `w` then holds the weights, which sum to one over all
    /// tiles, and `logit` their logits, both [rows, columns]; weights of rejected queries are 0, their logits
    /// undefined.
    template <class Visit>
    void visit_weights(Visit visit) {
        tolerance_ = TOLERANCE;
        start(false);
        const bool one = refs.padded <= columns;
        for (int64_t from = 0; from < refs.padded; from += columns)
            weigh(from, std::min(from + columns, refs.padded), false);
        for (int64_t from = 0; from < refs.padded; from += columns) {
            const int64_t to = std::min(from + columns, refs.padded);
            if (!one) find_products(from, to);
            for (int64_t n = 0; n < rows; ++n) {
                if (!one) weigh_again(n, from, to);
                normalize(n, from, to);
            }
            visit(from, to);
        }
    }

    /// out_n += sum_j weights_nj c_j over a tile, c_j centered coordinates.
    void add_products(const float* weights, int64_t from, int64_t to, const Panels& out) {
        product.add(weights, columns, 1, rows, to - from, refs.panels, set * refs.padded + from, out, 0);
    }

    /// Coordinates of query n as given, or as the sum of origin and centered ones.
    void exact(int64_t n, double* out) const {
        if (is_given_) return given_.read(n, 0, refs.D, out);
        const float* origin = refs.origin(set);
        for (int64_t p = 0; p < x.count; ++p)
            for (int64_t d = 0; d < x.inside(p); ++d)
                out[p * PANEL + d] = static_cast<double>(x.row(p, n)[d]) + static_cast<double>(origin[p * PANEL + d]);
    }

    /// r_head - x of query n, one panel.
    void head_displacement(int64_t n, int64_t panel, float* out) const {
        const int64_t first = panel * PANEL, here = x.inside(panel);
        const Points& points = refs.points(set);
        const float *head = points.floats(query[n].head), *point = is_given_ ? given_.floats(n) : nullptr;
        if (head && point) {
            for (int64_t d = 0; d < here; ++d) out[d] = head[first + d] - point[first + d];
            return;
        }
        double from[PANEL], to[PANEL];
        points.read(query[n].head, first, first + here, to);
        if (is_given_) {
            given_.read(n, first, first + here, from);
            for (int64_t d = 0; d < here; ++d) out[d] = static_cast<float>(to[d] - from[d]);
            return;
        }
        const float *origin = refs.origin(set) + first, *centered = x.row(panel, n);
        for (int64_t d = 0; d < here; ++d)
            out[d] = static_cast<float>(to[d] - static_cast<double>(origin[d]) - static_cast<double>(centered[d]));
    }

    /// The average of the values for query n.
    void average(int64_t n, float* out) const {
        const float inverse = static_cast<float>(1 / (1 + query[n].rest));
        for (int64_t p = 0; p < sum.count; ++p) {
            const float* row = sum.row(p, n);
            for (int64_t d = 0; d < sum.inside(p); ++d) out[p * PANEL + d] = row[d] * inverse;
        }
    }

    /// The mean of query n; before `displace`.
    void mean(int64_t n, float* out) const {
        const Query& q = query[n];
        const float inverse = static_cast<float>(1 / (1 + q.rest)), others = static_cast<float>(1 + q.rest - q.share);
        for (int64_t p = 0; p < sum.count; ++p) {
            const float *row = sum.row(p, n), *head = refs.row(set, p, q.head), *origin = refs.origin(set) + p * PANEL;
            float* to = out + p * PANEL;
            for (int64_t d = 0; d < sum.inside(p); ++d) to[d] = origin[d] + (row[d] + others * head[d]) * inverse;
        }
    }

    /// Replaces `sum` of query n by m - x. Rejects the query if the sum has too few digits for that.
    void displace(int64_t n) {
        Query& q = query[n];
        if (q.rejected) return;
        const float inverse = static_cast<float>(1 / (1 + q.rest)), share = static_cast<float>(q.share);
        double square = 0;
        for (int64_t p = 0; p < sum.count; ++p) {
            float* to = sum.row(p, n);
            const float* head = refs.row(set, p, q.head);
            float from_head[PANEL];
            head_displacement(n, p, from_head);
            for (int64_t d = 0; d < sum.inside(p); ++d) to[d] = (to[d] - share * head[d]) * inverse + from_head[d];
            square += sum.square(n, p);
        }
        // Sums of up to 128 floats that are all alike lose a little more than one rounding.
        const double error = 1.5e-7 * q.share / (1 + q.rest) * refs.widest(set);
        if (!(error <= 1e-6 * std::sqrt(square))) q.rejected = true;
    }

    /// log of the sum of weights: log p without its constant.
    double log_sum(int64_t n) const {
        const Query& q = query[n];
        if (weighting_) return std::log1p(q.rest) + q.top / LOG2_E + weighting_->top;
        return std::log1p(q.rest) + (q.top - q.norm * q.scale) / LOG2_E;
    }

    std::vector<int64_t> rejected() const {
        std::vector<int64_t> list;
        for (int64_t n = 0; n < rows; ++n)
            if (query[n].rejected) list.push_back(n);
        if (double* estimates = float_debug.estimates)
            for (int64_t n = 0; n < rows; ++n) estimates[n] = query[n].rejected ? -1 : query[n].bound;
        float_debug.seen += rows;
        float_debug.rejected += static_cast<int64_t>(list.size());
        return list;
    }

    const FloatRows& refs;
    const int64_t set, columns;
    int64_t rows = 0;
    Panels x, sum;
    Buffer<Query> query;
    Buffer<double> logit;
    Buffer<float> w;
    FloatProduct product;

private:
    static constexpr int64_t FEW = 8;

    void start(bool mean) {
        const double widest = refs.widest(set);
        untrusted_ = false;
        for (int64_t n = 0; n < rows; ++n) {
            Query& q = query[n];
            q.top = -INFINITY;
            q.rest = q.share = q.bound = 0;
            q.head = -1;
            const double size = (std::sqrt(q.norm) + widest) * slope(q, widest * widest) * widest;
            // Beyond these, products overflow, or a logit has too few digits even in float64. A NaN is beyond.
            q.rejected = !(q.norm <= LARGEST * LARGEST && widest <= LARGEST && size <= 1e9 && fits_float(q.variance));
            if (weighting_) q.rejected |= !weighting_->fits;
            if (mean) sum.clear(n);
        }
    }

    /// Inner products of all queries with a tile: floats in `w` if there is one panel, else doubles in `logit`.
    void find_products(int64_t from, int64_t to) {
        if (refs.is_one_panel())
            refs.panel_dots(set, 0, x, rows, from, to, w.get(), columns);
        else
            refs.dots(set, x, rows, from, to, logit.get(), w.get(), columns);
    }

    void weigh(int64_t from, int64_t to, bool mean) {
        find_products(from, to);
        std::vector<int64_t> many;
        int64_t probes = 4;
        for (int64_t n = 0; n < rows; ++n) {
            Query& q = query[n];
            if (q.rejected) continue;
            find_logits(n, from, to);
            if (q.rejected) continue;
            refine_best(n, from);
            find_weights_of_others(n, from, to);
            if (q.live > FEW) {
                many.push_back(n);
            } else if (q.live > 0) {
                if (probes-- > 0) probe(n, from, to);
                repair(n, from, to, true);
                const int64_t live = q.live;
                find_weights_of_others(n, from, to);
                q.live = live;
            }
        }
        if (!many.empty()) judge(many, from, to);
        for (int64_t n = 0; n < rows; ++n) {
            query[n].rejected |= untrusted_;
            if (query[n].rejected)
                std::fill_n(w.get() + n * columns, to - from, 0.0f);
            else
                settle(n, from, to, mean);
        }
    }

    /// Rounding errors of logits are below this, times `scale`: a bound for any order of the sum.
    double margin(int64_t n) const {
        const double widest = refs.widest(set);
        const double size = std::sqrt(query[n].norm) + widest, error = 2e-5 * size * size;
        return error * slope(query[n], error);
    }
    /// The most that a logit changes with a squared distance that is at least `nearest`.
    double slope(const Query& q, double nearest) const {
        return weighting_ ? weighting_->slope(q.scale, nearest) : q.scale;
    }
    /// The part of |x|^2 + |r|^2 below which a squared distance found by products is not used, with weighting.
    double smallest() const { return weighting_->laplace ? 1.0 / 32 : 0; }
    bool averages_values() const { return weighting_ && weighting_->has_values; }
    /// The logit of query n for reference point j at a squared distance.
    double logit_at(int64_t n, int64_t j, double square) const {
        const Query& q = query[n];
        return weighting_ ? weighting_->logit(j, q.scale, square) : (q.norm - square) * q.scale;
    }

    /// Turns inner products of query n into logits; `best` is the largest, `at` its place in the tile.
    void find_logits(int64_t n, int64_t from, int64_t to) {
        static constexpr uint64_t COUNT[8] = {0, 1, 2, 3, 4, 5, 6, 7};
        if (weighting_) find_weighted_logits(n, from, to);
        Query& q = query[n];
        double* y = logit.get() + n * columns;
        const double* norm = refs.norms(set) + from;
        const float* product_of = w.get() + n * columns;
        const bool one_panel = refs.is_one_panel();
        Vec best = broadcast(-static_cast<double>(INFINITY));
        Word at = {}, place;
        std::memcpy(&place, COUNT, sizeof place);
        for (int64_t j = 0; j < to - from; j += LANES) {
            Vec value = load(y + j);
            if (!weighting_) {
                const Vec product_with = one_panel ? widen(product_of + j) : value;
                value = (product_with * 2.0 - load(norm + j)) * q.scale;
                store(y + j, value);
            }
            at = value > best ? place : at;
            best = value > best ? value : best;
            place += LANES;
        }
        q.best = -INFINITY;
        q.at = 0;
        for (int i = 0; i < LANES; ++i)
            if (best[i] > q.best || (best[i] == q.best && static_cast<int64_t>(at[i]) < q.at)) {
                q.best = best[i];
                q.at = static_cast<int64_t>(at[i]);
            }
    }

    /// `find_logits` with a weighting, but for the largest.
    void find_weighted_logits(int64_t n, int64_t from, int64_t to) {
        Query& q = query[n];
        double* y = logit.get() + n * columns;
        const int64_t own = weighting_->excludes ? (indices_ ? indices_[first_ + n] : first_ + n) : -1;
        const bool here = from <= own && own < to;
        find_squares(n, from, to, here ? own - from : -1);
        if (q.rejected) return;
        if (weighting_->laplace) {
            float* distance = w.get() + n * columns;  // whose products are no longer needed
            for (int64_t j = 0; j < to - from; ++j) distance[j] = static_cast<float>(y[j]);
            for (int64_t j = 0; j < to - from; ++j) distance[j] = std::sqrt(distance[j]);
            for (int64_t j = 0; j < to - from; ++j) y[j] = static_cast<double>(distance[j]);
        }
        const double *bias = weighting_->bias(), *factor = weighting_->factor(), scale = -q.scale;
        if (factor)
            for (int64_t j = 0; j < to - from; ++j) y[j] *= factor[from + j];
        if (bias)
            for (int64_t j = 0; j < to - from; ++j) y[j] = bias[from + j] + y[j] * scale;
        else
            for (int64_t j = 0; j < to - from; ++j) y[j] *= scale;
    }

    /// Turns inner products into squared distances; that at the place `own`, if not -1, becomes infinite. Those so
    /// small that they are lost in rounding, which a distance itself would show, are computed from differences; rejects
    /// a query with many of them.
    void find_squares(int64_t n, int64_t from, int64_t to, int64_t own) {
        Query& q = query[n];
        double* y = logit.get() + n * columns;
        const float* product_of = w.get() + n * columns;
        const double* norm = refs.norms(set) + from;
        const bool one_panel = refs.is_one_panel();
        const double smallest = this->smallest();
        Vec nearest = broadcast(static_cast<double>(INFINITY));
        Word near = {};
        for (int64_t j = 0; j < to - from; j += LANES) {
            const Vec product_with = one_panel ? widen(product_of + j) : load(y + j), both = load(norm + j) + q.norm;
            const Vec square = both - product_with * 2.0;
            const auto lost = square < both * smallest;
            near |= reinterpret_cast<Word>(lost);
            nearest = lost ? nearest : smaller(square, nearest);
            store(y + j, square > 0.0 ? square : Vec{});
        }
        if (own >= 0) y[own] = INFINITY;
        q.nearest = std::min(from == 0 ? INFINITY : q.nearest, lowest(nearest));
        uint64_t any = 0;
        for (int i = 0; i < LANES; ++i) any |= near[i];
        if (!any || !weighting_->laplace) return;
        exact(n, exact_.get());
        int64_t few = FEW;
        for (int64_t j = 0; j < std::min(to, refs.M) - from; ++j) {
            if (!(y[j] < (norm[j] + q.norm) * smallest) || weighting_->is_absent(from + j)) continue;
            y[j] = distance(from + j);
            if (few-- == 0) {
                q.rejected = true;
                return;
            }
        }
    }

    /// Computes the product of the largest logit of a tile in float64: its error would scale all other weights, and it
    /// is the largest error where the query is a reference point itself, or near one.
    void refine_best(int64_t n, int64_t from) {
        Query& q = query[n];
        const int64_t j = from + q.at;
        if (q.best <= q.top || j >= refs.M) return;
        const double dot = 2 * refs.dot(set, x, n, j), norm = refs.norms(set)[j];
        if (weighting_) {
            const double square = q.norm + norm - dot;
            if (square > (q.norm + norm) * smallest()) {
                q.best = weighting_->logit(j, q.scale, square);
            } else {
                exact(n, exact_.get());
                q.best = weighting_->logit(j, q.scale, distance(j));
            }
        } else {
            q.best = (dot - norm) * q.scale;
        }
        logit[n * columns + q.at] = q.best;
    }

    /// The weights 2^(y - top) of a tile, or 0 where that is below rounding of the sum. Counts the reference points
    /// whose weight may be above it, given the errors of logits.
    void find_weights(int64_t n, int64_t from, int64_t to, double top) {
        Query& q = query[n];
        const double *y = logit.get() + n * columns, *norm = refs.norms(set) + from;
        float* out = w.get() + n * columns;
        q.limit = top - cut_ - 2 * margin(n);
        q.live = 0;
        q.widest = q.added = 0;
        if (q.best < q.limit || q.best == -INFINITY) {
            std::fill_n(out, to - from, 0.0f);
            return;
        }
        Word live = {};
        Vec widest = {};
        for (int64_t j = 0; j < to - from; j += LANES) {
            const Vec value = load(y + j), square = load(norm + j);
            const auto inside = value >= q.limit;
            live -= reinterpret_cast<Word>(inside);
            widest = inside && square > widest ? square : widest;
            narrow(out + j, value - top);
        }
        for (int i = 0; i < LANES; ++i) {
            q.live += static_cast<int64_t>(live[i]);
            q.widest = std::max(q.widest, widest[i]);
        }
        q.widest = std::sqrt(q.widest);
        const float cut = static_cast<float>(-cut_);
        Floats total = {};
        for (int64_t j = 0; j < to - from; j += FLOATS) {
            const Floats exponent = load(out + j);
            const Floats weight = exponent > cut ? power_of_two(exponent) : Floats{};
            store(out + j, weight);
            total += weight;
        }
        q.added = static_cast<double>(FLUX_TARGET::sum(total));
    }

    /// Weights of a tile relative to the largest logit so far. If that is in this tile it will be the head, which has
    /// no entry.
    void find_weights_of_others(int64_t n, int64_t from, int64_t to) {
        Query& q = query[n];
        double& largest = logit[n * columns + q.at];
        if (!(q.best > q.top)) return find_weights(n, from, to, q.top);
        largest = -INFINITY;
        find_weights(n, from, to, q.best);
        largest = q.best;
        ++q.live;
        q.widest = std::max(q.widest, std::sqrt(refs.norms(set)[from + q.at]));
    }

    /// |x_n - r_j|^2 from exact differences; x is exact_.
    double distance(int64_t j) const {
        double* ref = exact_.get() + round_up(refs.D, 8);
        refs.points(set).read(j, 0, refs.D, ref);
        return squared_distance(exact_.get(), ref, refs.D);
    }

    /// Whether a logit found by a product is as far from the exact one as no rounding explains: then no product of the
    /// block is trusted. Lanes sum up far more exactly than the bound allows.
    bool is_off(int64_t n, double exact, double found) const {
        return found > -INFINITY && !(std::abs(exact - found) <= margin(n) / 20);
    }

    /// Checks the logit of some reference point.
    void probe(int64_t n, int64_t from, int64_t to) {
        const int64_t j = from + n * 7919 % (std::min(to, refs.M) - from);
        exact(n, exact_.get());
        untrusted_ |= is_off(n, logit_at(n, j, distance(j)), logit[n * columns + j - from]);
    }

    /// Computes the logits of all live reference points from differences.
    void repair(int64_t n, int64_t from, int64_t to, bool check) {
        Query& q = query[n];
        double* y = logit.get() + n * columns;
        exact(n, exact_.get());
        q.best = -INFINITY;
        for (int64_t j = 0; j < to - from; ++j) {
            if (!(y[j] >= q.limit)) continue;
            const double value = logit_at(n, from + j, distance(from + j));
            untrusted_ |= check && is_off(n, value, y[j]);
            y[j] = value;
            if (value > q.best) {
                q.best = value;
                q.at = j;
            }
        }
    }

    /// Measures errors of differences of two logits of a query on a sample of the queries listed: of the largest logit
    /// and another one that matters. Rejects queries whose logits may be wrong.
    void judge(const std::vector<int64_t>& many, int64_t from, int64_t to) {
        constexpr int64_t SAMPLES = 16;
        const auto count = static_cast<int64_t>(many.size()), sampled = std::min(count, SAMPLES);
        const int64_t each = std::min<int64_t>(4, (SAMPLES + sampled - 1) / sampled);
        double squares = 0;
        for (int64_t s = 0; s < sampled; ++s) {
            const int64_t n = many[static_cast<size_t>(s * count / sampled)];
            const Query& q = query[n];
            const double* y = logit.get() + n * columns;
            exact(n, exact_.get());
            const double nearest = distance(from + q.at);
            for (int64_t k = 0; k < each; ++k) {
                int64_t j =
                    static_cast<int64_t>(
                        (static_cast<uint64_t>(n + from) * 4 + static_cast<uint64_t>(k)) * 0x9E3779B97F4A7C15u >> 40) %
                    (to - from);
                while (!(y[j] >= q.limit) || j == q.at) j = (j + 1) % (to - from);
                const double found = weighting_ ? weighting_->square(from + q.at, q.scale, y[q.at]) -
                                                      weighting_->square(from + j, q.scale, y[j])
                                                : (y[j] - y[q.at]) / q.scale;
                const double error = found - (nearest - distance(from + j));
                const double relative = error / size(q);
                squares += relative * relative;
            }
        }
        // Six standard deviations, so that the largest of many errors is below; at least one rounding, which numbers
        // with few digits seldom need.
        const double deviation = std::max(std::sqrt(squares / static_cast<double>(sampled * each)), 0x1p-25);
        untrusted_ |= deviation > 1e-6;
        for (const int64_t n : many) {
            Query& q = query[n];
            q.bound = std::max(q.bound, 6 * deviation * size(q) * slope(q, q.nearest) / LOG2_E);
            if (!(q.bound <= tolerance_)) q.rejected = true;
        }
    }
    /// What rounding errors of squared distances are proportional to.
    double size(const Query& q) const { return (std::sqrt(q.norm) + q.widest) * q.widest + 1e-300; }

    /// Adds the weights of a tile; its largest logit, if it is the largest so far, becomes the head.
    void settle(int64_t n, int64_t from, int64_t to, bool mean) {
        Query& q = query[n];
        if (q.best > q.top) {
            if (q.head >= 0) {
                const double factor = std::exp2(q.top - q.best);
                if (mean && averages_values())
                    scale_sum(n, factor);
                else if (mean)
                    push(n, from + q.at, factor);
                q.rest = (q.rest + 1) * factor;
                q.share *= factor;
            }
            q.head = from + q.at;
            q.top = q.best;
            if (averages_values()) w[n * columns + q.at] = 1;
        }
        q.rest += q.added;
        if (!mean || averages_values()) return;
        if (q.live > FEW) {
            q.share += q.added;
            return;
        }
        float* to_row = w.get() + n * columns;
        for (int64_t j = 0; q.live > 0 && j < to - from; ++j)
            if (to_row[j] != 0) {
                add_difference(n, static_cast<double>(to_row[j]), from + j, q.head);
                to_row[j] = 0;
            }
    }

    /// Scales what was summed, and makes reference point j the head instead.
    void push(int64_t n, int64_t j, double factor) {
        const Query& q = query[n];
        scale_sum(n, factor);
        add_difference(n, (q.rest - q.share + 1) * factor, q.head, j);
    }

    void scale_sum(int64_t n, double factor) const {
        for (int64_t p = 0; p < sum.count; ++p)
            for (int64_t d = 0; d < sum.inside(p); ++d) sum.row(p, n)[d] *= static_cast<float>(factor);
    }

    /// sum_n += weight (r_j - r_k), from the points as given.
    void add_difference(int64_t n, double weight, int64_t j, int64_t k) {
        double one[PANEL], other[PANEL];
        const Points& points = refs.points(set);
        for (int64_t p = 0; p < sum.count; ++p) {
            const int64_t first = p * PANEL, here = sum.inside(p);
            points.read(j, first, first + here, one);
            points.read(k, first, first + here, other);
            float* to = sum.row(p, n);
            for (int64_t d = 0; d < here; ++d) to[d] += static_cast<float>(weight * (one[d] - other[d]));
        }
    }

    /// The logits and weights of a tile, relative to the largest of all tiles.
    void weigh_again(int64_t n, int64_t from, int64_t to) {
        Query& q = query[n];
        float* to_row = w.get() + n * columns;
        if (q.rejected) {
            std::fill_n(to_row, to - from, 0.0f);
            return;
        }
        find_logits(n, from, to);
        find_weights(n, from, to, q.top);
        if (q.live == 0 || q.live > FEW) return;
        repair(n, from, to, false);
        find_weights(n, from, to, q.top);
    }

    void normalize(int64_t n, int64_t from, int64_t to) {
        const Query& q = query[n];
        if (q.rejected) return;
        const float inverse = static_cast<float>(1 / (1 + q.rest));
        float* row = w.get() + n * columns;
        for (int64_t j = 0; j < to - from; ++j) row[j] *= inverse;
        if (from <= q.head && q.head < to) row[q.head - from] = inverse;
    }

    Points given_{};
    bool is_given_ = false, untrusted_ = false;
    const FloatWeighting* weighting_;
    int64_t first_ = 0;  // place of the first query in its group, and indices by place, or null
    const int64_t* indices_ = nullptr;
    Buffer<double> exact_;
    double cut_, tolerance_ = 0;
};

/// Rows of some queries of an array in float64: arguments and results of those that float32 cannot serve.
class Gathered {
public:
    Gathered(const std::vector<int64_t>& rows, int64_t D)
        : rows_(rows), D_(D), data_(static_cast<int64_t>(rows.size()) * D) {
        view.data = reinterpret_cast<char*>(data_.get());
        view.stride[1] = D;
        view.stride[2] = 1;
    }
    Gathered(const Array& from, const std::vector<int64_t>& rows, int64_t D) : Gathered(rows, D) {
        for (size_t i = 0; i < rows.size(); ++i) from.at(0, rows[i]).load(1, D, row(i), D);
    }
    double* row(size_t i) const { return data_.get() + static_cast<int64_t>(i) * D_; }
    void place(const Array& to) const {
        if (!to) return;
        for (size_t i = 0; i < rows_.size(); ++i) to.at(0, rows_[i]).store(1, D_, row(i), D_);
    }

    Array view{};

private:
    std::vector<int64_t> rows_;
    int64_t D_;
    Buffer<double> data_;
};

/// Writes row n of an array with fill(out), in place where the array holds floats.
template <class Fill>
static void write_row(const Array& to, int64_t n, int64_t D, Fill fill) {
    if (!to) return;
    const Points points{to};
    if (const float* row = points.floats(n)) return fill(const_cast<float*>(row));
    Buffer<float> row(D);
    Buffer<double> wide(D);
    fill(row.get());
    for (int64_t d = 0; d < D; ++d) wide[d] = static_cast<double>(row[d]);
    to.at(0, n).store(1, D, wide.get(), D);
}
