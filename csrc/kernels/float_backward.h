// Derivatives in many dimensions for arguments in float32; see kde.h and residual.h.
//
// Included inside of a target's namespace.

/// The products v_n . r_j of a block of queries with one vector each, and coefficients made from them:
/// c_j = w_j (v.r_j - v.m + constant - slope (a_j - a_head)), w and a from `FloatQueries::visit_weights`.
///
/// All products are taken relative to that with the heaviest reference point, the head, whose weight may be close to
/// one: so none of the coefficients is a small difference of large numbers.
class FloatCoefficients {
public:
    struct Sums {
        double head;  // v.r_head
        double weight, first, second,
            near;     // sums of w, w e, w e^2 and w (a - a_head), e = v.(r_j - r_head) - slope (a_j - a_head)
        double mean;  // of e
        double constant, slope;
        double total, rest, squares;  // sums of c, of c without the head, and of c (a - a_head)
        double length;                // |v|
    };

    FloatCoefficients(FloatQueries& q, int64_t most)
        : v(most, q.refs.D), sums(most), c(most * q.columns), q_(q), dot_(most * q.columns) {}

    /// Loads row n of v, the sum of two arrays, the second optional.
    void take(int64_t n, const Array& one, const Array& other, double constant, double slope) {
        const int64_t D = q_.refs.D;
        Buffer<double> row(2 * D);
        one.at(0, n).load(1, D, row.get(), D);
        if (other) {
            other.at(0, n).load(1, D, row.get() + D, D);
            for (int64_t d = 0; d < D; ++d) row[d] += row[D + d];
        }
        sums[n] = {};
        double square = 0;
        for (int64_t p = 0; p < v.count; ++p) {
            for (int64_t d = 0; d < v.inside(p); ++d) v.row(p, n)[d] = static_cast<float>(row[p * PANEL + d]);
            std::fill(v.row(p, n) + v.inside(p), v.row(p, n) + v.width(p), 0.0f);
            square += v.square(n, p);
        }
        sums[n].length = std::sqrt(square);
        vanish_ = (n == 0 || vanish_) && square == 0;
        sums[n].constant = constant;
        sums[n].slope = slope;
    }

    /// Calls use(from, to) for tiles of reference points; `q.w` then holds the weights and `c` the coefficients, those
    /// of rejected queries 0.
    template <class Use>
    void visit(Use use) {
        const bool one = q_.refs.padded <= q_.columns;
        if (!one) {
            q_.visit_weights([&](int64_t from, int64_t to) { add_sums(from, to); });
            finish_sums();
        }
        q_.visit_weights([&](int64_t from, int64_t to) {
            find_dots(from, to);
            if (one) {
                add_sums(from, to);
                finish_sums();
            }
            for (int64_t n = 0; n < q_.rows; ++n) find_coefficients(n, from, to);
            use(from, to);
        });
    }

    /// Sets the coefficients of the heads in a tile: to 0, or back.
    void set_heads(int64_t from, int64_t to, bool back) {
        for (int64_t n = 0; n < q_.rows; ++n) {
            const int64_t head = q_.query[n].head;
            if (q_.query[n].rejected || head < from || head >= to) continue;
            c[n * q_.columns + head - from] = back ? static_cast<float>(sums[n].total - sums[n].rest) : 0.0f;
        }
    }

    /// Whether the vectors of all queries are 0, as with a cotangent of the log-density alone.
    bool vanish() const { return vanish_; }

    /// Squared distance to the head.
    double nearest(int64_t n) const { return q_.query[n].norm - q_.query[n].top / q_.query[n].scale; }

    Panels v;
    Buffer<Sums> sums;
    Buffer<float> c;

private:
    void find_dots(int64_t from, int64_t to) {
        if (vanish_) {
            std::fill_n(dot_.get(), q_.rows * q_.columns, 0.0);
            return;
        }
        q_.refs.dots(q_.set, v, q_.rows, from, to, dot_.get(), c.get(), q_.columns);
        for (int64_t n = 0; n < q_.rows; ++n) {
            const FloatQueries::Query& query = q_.query[n];
            if (query.rejected) continue;
            if (from == 0) sums[n].head = q_.refs.dot(q_.set, v, n, query.head);
            if (from <= query.head && query.head < to) dot_[n * q_.columns + query.head - from] = sums[n].head;
        }
    }

    void add_sums(int64_t from, int64_t to) {
        if (q_.refs.padded > q_.columns) find_dots(from, to);
        for (int64_t n = 0; n < q_.rows; ++n) {
            const FloatQueries::Query& query = q_.query[n];
            if (query.rejected) continue;
            const double *y = q_.logit.get() + n * q_.columns, *dot = dot_.get() + n * q_.columns;
            const float* w = q_.w.get() + n * q_.columns;
            const double across = 1 / query.scale, slope = sums[n].slope / query.scale, base = sums[n].head;
            Vec weight = {}, first = {}, second = {}, near = {};
            for (int64_t j = 0; j < to - from; j += LANES) {
                const Vec share = widen(w + j), drop = query.top - load(y + j);
                const Vec inside = share > 0.0 ? drop : Vec{};
                const Vec value = load(dot + j) - base - inside * slope;
                weight += share;
                first += share * value;
                second += share * value * value;
                near += share * inside;
            }
            Sums& s = sums[n];
            s.weight += sum(weight);
            s.first += sum(first);
            s.second += sum(second);
            s.near += sum(near) * across;
        }
    }

    /// Means from sums. Rejects queries whose products have too few digits for their differences.
    void finish_sums() {
        for (int64_t n = 0; n < q_.rows; ++n) {
            FloatQueries::Query& query = q_.query[n];
            if (query.rejected) continue;
            Sums& s = sums[n];
            const double others = query.rest / (1 + query.rest), widest = q_.refs.widest(q_.set);
            s.mean = s.first / s.weight;
            const double level = s.constant - s.mean;
            // The sum of w (e - mean + constant)^2 without the head, whose e is 0.
            const double square = s.second + 2 * level * s.first + level * level * others;
            const double size = std::sqrt(std::max(0.0, square * others)), of_head = std::abs(level) / (1 + query.rest);
            // A product of rows of D numbers, none of which stands out.
            const double error = 3e-7 * s.length * widest / std::sqrt(static_cast<double>(q_.refs.D));
            if (!(error * others <= 1e-6 * (size + of_head))) query.rejected = true;
            // c (x - r) is the difference of c x and c r.
            const double away = std::sqrt(std::max(0.0, nearest(n))),
                         around = std::sqrt(std::max(0.0, s.near / std::max(others, 1e-300) + nearest(n)));
            const double lost = 1.2e-7 * size * (std::sqrt(query.norm) + widest) / query.variance;
            const double whole = (size * around + of_head * away) / query.variance + s.length;
            if (!(lost <= 1e-6 * whole)) query.rejected = true;
        }
    }

    void find_coefficients(int64_t n, int64_t from, int64_t to) {
        const FloatQueries::Query& query = q_.query[n];
        float *out = c.get() + n * q_.columns, *w = q_.w.get() + n * q_.columns;
        if (query.rejected) {
            std::fill_n(out, to - from, 0.0f);
            std::fill_n(w, to - from, 0.0f);
            return;
        }
        Sums& s = sums[n];
        const double *y = q_.logit.get() + n * q_.columns, *dot = dot_.get() + n * q_.columns;
        const double slope = s.slope / query.scale, level = s.constant - s.mean - s.head;
        Vec total = {}, squares = {};
        for (int64_t j = 0; j < to - from; j += LANES) {
            const Vec share = widen(w + j), drop = query.top - load(y + j);
            const Vec inside = share > 0.0 ? drop : Vec{};
            const Vec value = share * (load(dot + j) + level - inside * slope);
            total += value;
            squares += value * inside;
            for (int i = 0; i < LANES; ++i) out[j + i] = static_cast<float>(value[i]);
        }
        const double added = sum(total);
        s.total += added;
        s.squares += sum(squares) / query.scale;
        s.rest += added;
        if (from <= query.head && query.head < to)
            s.rest -= (s.constant - s.mean) * static_cast<double>(w[query.head - from]);
    }

    FloatQueries& q_;
    Buffer<double> dot_;
    bool vanish_ = true;
};

/// Computes the cotangents of some queries of a block anew in float64; those of the reference points are added to
/// `sums`.
static void repeat_backward(const KdeBackwardArguments& args, const std::vector<int64_t>& rows, double* sums) {
    const int64_t M = args.shape.M, D = args.shape.D;
    const Gathered g_shift(args.g_shift, rows, D), g_mean(args.g_mean, rows, D), g_log(args.g_log_density, rows, 1),
        z(args.z, rows, D), sigma2(args.sigma2, rows, 1), g_z(rows, D), g_sigma2(rows, 1);
    const std::vector<int64_t> every(static_cast<size_t>(M));
    const Gathered g_refs(every, D);
    const Shape shape{1, static_cast<int64_t>(rows.size()), M, D};
    kde_backward_with<Rows>({shape, 1, g_shift.view, g_mean.view, g_log.view, z.view, args.refs, sigma2.view, g_z.view,
                             g_refs.view, g_sigma2.view, args.normalized});
    g_z.place(args.g_z);
    g_sigma2.place(args.g_sigma2);
    for (int64_t i = 0; i < M * D; ++i) sums[i] += g_refs.row(0)[i];
}

/// Writes the cotangents of the queries, sum_j c_j (r_j - x) - g_shift, and of the variances; adds the heads' part of
/// those of the reference points.
static void store_query_cotangents(const KdeBackwardArguments& block, FloatQueries& q, const FloatCoefficients& k,
                                   const Panels& sum, const Panels& g_refs) {
    const int64_t D = block.shape.D;
    Buffer<double> g_shift(D);
    for (int64_t n = 0; n < q.rows; ++n) {
        const FloatQueries::Query& query = q.query[n];
        if (query.rejected) continue;
        const auto& s = k.sums[n];
        block.g_shift.at(0, n).load(1, D, g_shift.get(), D);
        const auto scale = static_cast<float>(1 / query.variance), rest = static_cast<float>(s.rest),
                   total = static_cast<float>(s.total),
                   of_head = static_cast<float>((s.total - s.rest) / query.variance);
        write_row(block.g_z, n, D, [&](float* out) {
            for (int64_t p = 0; p < sum.count; ++p) {
                const float *row = sum.row(p, n), *head = q.refs.row(q.set, p, query.head);
                float displacement[PANEL];
                q.head_displacement(n, p, displacement);
                float* g_head = g_refs.row(p, query.head);
                for (int64_t d = 0; d < sum.inside(p); ++d) g_head[d] -= of_head * displacement[d];
                for (int64_t d = 0; d < sum.inside(p); ++d)
                    out[p * PANEL + d] = (row[d] - rest * head[d] + total * displacement[d]) * scale -
                                         static_cast<float>(g_shift[p * PANEL + d]);
            }
        });
        const double g = block.normalized ? s.constant : 0, squares = s.squares + s.total * k.nearest(n);
        const double g_sigma2 = (squares / query.variance - g * static_cast<double>(D)) / query.variance / 2;
        block.g_sigma2.at(0, n).store(1, 1, &g_sigma2, 1);
    }
}

static void kde_backward_floats(const KdeBackwardArguments& args) {
    const int64_t B = args.shape.B, N = args.shape.N, M = args.shape.M, D = args.shape.D;
    const FloatRows refs = float_refs(args.refs, args.shape, args.threads);
    const Partial partial(B, N, FloatRows::BLOCK, args.threads, M * D);
    partial.add([&](int64_t b, int64_t begin, int64_t share, double* sums) {
        const int64_t most = std::min(share, FloatRows::BLOCK), set = set_of(args.refs, b);
        FloatQueries q(refs, set, most, false);
        FloatCoefficients k(q, most);
        FloatProduct outer(refs.tile);
        const Panels g_z(most, D), g_refs(refs.padded, D);
        Buffer<double> weight(refs.padded);
        std::fill_n(weight.get(), refs.padded, 0.0);
        for (int64_t j = 0; j < refs.padded; ++j) g_refs.clear(j);
        for (int64_t first = begin; first < begin + share; first += most) {
            const int64_t count = std::min(most, begin + share - first);
            KdeBackwardArguments block = args;
            for (Array* array : {&block.g_shift, &block.g_mean, &block.g_log_density, &block.z, &block.sigma2,
                                 &block.g_z, &block.g_sigma2})
                *array = array->at(b, first);
            block.refs = args.refs.at(b);
            q.take(Points{block.z}, block.sigma2, count);
            for (int64_t n = 0; n < count; ++n) {
                g_z.clear(n);
                k.take(n, block.g_shift, block.g_mean, block.g_log_density.number(0, n), 0);
            }
            k.visit([&](int64_t from, int64_t to) {
                if (!k.vanish()) outer.add(q.w.get(), 1, q.columns, to - from, count, k.v, 0, g_refs, from);
                k.set_heads(from, to, false);
                for (int64_t n = 0; n < count; ++n) {
                    const auto scale = static_cast<float>(1 / q.query[n].variance);
                    const float* c = k.c.get() + n * q.columns;
                    float* scaled = q.w.get() + n * q.columns;
                    for (int64_t j = 0; j < to - from; ++j) {
                        scaled[j] = c[j] * scale;
                        weight[from + j] += static_cast<double>(scaled[j]);
                    }
                }
                outer.add(q.w.get(), 1, q.columns, to - from, count, q.x, 0, g_refs, from);
                q.add_products(k.c.get(), from, to, g_z);
            });
            store_query_cotangents(block, q, k, g_z, g_refs);
            const std::vector<int64_t> rejected = q.rejected();
            if (!rejected.empty()) repeat_backward(block, rejected, sums);
        }
        for (int64_t j = 0; j < M; ++j)
            for (int64_t p = 0; p < g_refs.count; ++p) {
                const float *row = g_refs.row(p, j), *ref = refs.row(set, p, j);
                const double factor = weight[j];
                double* to = sums + j * D + p * PANEL;
                for (int64_t d = 0; d < g_refs.inside(p); ++d)
                    to[d] += static_cast<double>(row[d]) - factor * static_cast<double>(ref[d]);
            }
    });
    partial.collect([&](int64_t b, double* sums) { args.g_refs.at(b).store(M, D, sums, D); });
}
