// Reference points in many dimensions, for arguments in float32: inner products in float32 about an origin.
//
// Included inside of a target's namespace. Coordinates lie in panels of PANEL columns: [panel][row][pitch], so that a
// panel of all rows lies together. Squared distances are |x|^2 + |r|^2 - 2 x.r of centered coordinates, with the norms
// in float64; float_queries.h estimates what that costs and repairs it.

typedef float FourFloats __attribute__((vector_size(16)));

/// Points as the caller gives them: the rows of an array, or those moved by `pull` times the rows of another one.
struct Points {
    Array base, shift{};
    double pull = 0;

    /// Coordinates [first, last) of row n, exactly.
    void read(int64_t n, int64_t first, int64_t last, double* out) const {
        base.at(0, n, first).load(1, last - first, out, last - first);
        if (!shift) return;
        Buffer<double> moved(last - first);
        shift.at(0, n, first).load(1, last - first, moved.get(), last - first);
        for (int64_t d = 0; d < last - first; ++d) out[d] += pull * moved[d];
    }

    /// Row n where it lies in memory as floats; null if it does not.
    const float* floats(int64_t n) const {
        const bool here = !shift && base.type == Type::float32 && base.stride[2] == 1;
        return here ? reinterpret_cast<const float*>(base.at(0, n).data) : nullptr;
    }
};

// Columns whose products are summed in float32; sums of several panels are added in float64.
constexpr int64_t PANEL = 512;
static FloatDebug float_debug;

/// Rows of floats in panels. Columns up to a multiple of 16 are filled with zeros.
struct Panels {
    Panels(int64_t rows, int64_t D)
        : rows(rows),
          D(D),
          count((D + PANEL - 1) / PANEL),
          pitch(2 * odd_lines(round_up(std::min(D, PANEL), 16) / 2)),
          data(rows * count * pitch) {}

    int64_t inside(int64_t panel) const { return std::min(PANEL, D - panel * PANEL); }
    int64_t width(int64_t panel) const { return round_up(inside(panel), 16); }
    float* row(int64_t panel, int64_t n) const { return data.get() + (panel * rows + n) * pitch; }
    void clear(int64_t n) const {
        for (int64_t p = 0; p < count; ++p) std::fill_n(row(p, n), width(p), 0.0f);
    }

    /// Copies row n to consecutive floats.
    void copy(int64_t n, float* out) const {
        for (int64_t p = 0; p < count; ++p) std::copy_n(row(p, n), inside(p), out + p * PANEL);
    }

    /// Stores row n of `points` relative to an origin, one panel of it; returns its part of the squared norm.
    double center(const Points& points, int64_t from, int64_t panel, const float* origin, int64_t n) const {
        const int64_t first = panel * PANEL, here = inside(panel);
        float* to = row(panel, n);
        if (const float* raw = points.floats(from)) {
            for (int64_t d = 0; d < here; ++d) to[d] = raw[first + d] - origin[first + d];
        } else {
            double exact[PANEL];
            points.read(from, first, first + here, exact);
            for (int64_t d = 0; d < here; ++d) to[d] = static_cast<float>(exact[d] - origin[first + d]);
        }
        if (float_debug.coarse)
            for (int64_t d = 0; d < here; ++d) to[d] = static_cast<float>(static_cast<double>(BFloat16(to[d])));
        std::fill(to + here, to + width(panel), 0.0f);
        return square(n, panel);
    }
    double square(int64_t n, int64_t panel) const {
        const float* from = row(panel, n);
        Vec total[2] = {};
        for (int64_t d = 0; d < width(panel); d += 2 * LANES)
            for (int u = 0; u < 2; ++u) {
                const Vec v = widen(from + d + u * LANES);
                total[u] += v * v;
            }
        return sum(total[0] + total[1]);
    }

    const int64_t rows, D, count, pitch;
    Buffer<float> data;
};

/// |a - b|^2; both have zeros up to a multiple of LANES.
static double squared_distance(const double* a, const double* b, int64_t D) {
    Vec total[2] = {};
    int64_t d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES)
        for (int u = 0; u < 2; ++u) {
            const Vec difference = load(a + d + u * LANES) - load(b + d + u * LANES);
            total[u] += difference * difference;
        }
    for (; d < D; d += LANES) {
        const Vec difference = load(a + d) - load(b + d);
        total[0] += difference * difference;
    }
    return sum(total[0] + total[1]);
}

template <class Pattern, int... I>
FLUX_INLINE Floats shuffled(Floats a, Floats b, Pattern lane, std::integer_sequence<int, I...>) {
    (void)lane;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pattern::of(I)...);
#else
    return __builtin_shuffle(a, b, FloatWord{static_cast<uint32_t>(Pattern::of(I))...});
#endif
}
/// Of each four lanes, half of a's and half of b's: alternating, or two and two.
template <int HIGH>
struct Alternating {
    static constexpr int of(int i) { return i / 4 * 4 + 2 * HIGH + i % 4 / 2 + (i % 2) * FLOATS; }
};
template <int HIGH>
struct TwoAndTwo {
    static constexpr int of(int i) { return i / 4 * 4 + 2 * HIGH + i % 2 + (i % 4 / 2) * FLOATS; }
};
template <template <int> class Pattern>
FLUX_INLINE Floats folded(Floats a, Floats b) {
    constexpr std::make_integer_sequence<int, FLOATS> lanes{};
    return shuffled(a, b, Pattern<0>{}, lanes) + shuffled(a, b, Pattern<1>{}, lanes);
}

/// Stores the sums of four vectors.
FLUX_INLINE void store_sums(const Floats* v, float* out) {
    const Floats all = folded<TwoAndTwo>(folded<Alternating>(v[0], v[1]), folded<Alternating>(v[2], v[3]));
    FourFloats part[FLOATS / 4];
    std::memcpy(part, &all, sizeof all);
    for (int width = FLOATS / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    std::memcpy(out, part, sizeof part[0]);
}

class FloatRows {
public:
    static constexpr int64_t BLOCK = 128;
    // A register tile: queries x four reference points.
    static constexpr int QUERIES = FLUX_REGISTERS >= 32 ? 6 : 2;

    /// points_of(set): the M reference points of a set.
    template <class PointsOf>
    FloatRows(int64_t sets, int64_t M, int64_t D, int threads, PointsOf points_of)
        : M(M),
          D(D),
          padded(round_up(M, 16)),
          tile(std::min<int64_t>(padded, 1024)),
          panels(sets * padded, D),
          points_(static_cast<size_t>(sets)),
          widest_(static_cast<size_t>(sets)),
          origin_(sets * D),
          norm_(sets * padded),
          parts_(panels.count * sets * padded) {
        constexpr int64_t ROWS = 256;  // packed at once
        const int64_t chunks = (M + ROWS - 1) / ROWS;
        for (int64_t set = 0; set < sets; ++set) points_[static_cast<size_t>(set)] = points_of(set);
        parallel_for(sets * panels.count, threads,
                     [&](int64_t task) { choose_origin(task / panels.count, task % panels.count * PANEL); });
        parallel_for(sets * panels.count * chunks, threads, [&](int64_t task) {
            const int64_t set = task / chunks / panels.count, panel = task / chunks % panels.count;
            const int64_t first = task % chunks * ROWS, last = std::min(first + ROWS, M);
            for (int64_t j = first; j < last; ++j)
                part(panel, set, j) = panels.center(points(set), j, panel, origin(set), set * padded + j);
            if (last < M) return;
            for (int64_t j = M; j < padded; ++j) {
                std::fill_n(panels.row(panel, set * padded + j), panels.width(panel), 0.0f);
                part(panel, set, j) = 1e200;  // no weight is that far away
            }
        });
        parallel_for(sets, threads, [&](int64_t set) { add_norms(set); });
    }

    const Points& points(int64_t set) const { return points_[static_cast<size_t>(set)]; }
    const float* origin(int64_t set) const { return origin_.get() + set * D; }
    /// x . r_j in float64, x row n of other panels.
    double dot(int64_t set, const Panels& x, int64_t n, int64_t j) const {
        Vec total[2] = {};
        for (int64_t p = 0; p < x.count; ++p) {
            const float *a = x.row(p, n), *b = row(set, p, j);
            for (int64_t d = 0; d < x.width(p); d += 2 * LANES)
                for (int u = 0; u < 2; ++u) total[u] += widen(a + d + u * LANES) * widen(b + d + u * LANES);
        }
        return sum(total[0] + total[1]);
    }
    /// |r_j|^2 about the origin.
    const double* norms(int64_t set) const { return norm_.get() + set * padded; }
    /// Largest |r_j| of a set.
    double widest(int64_t set) const { return widest_[static_cast<size_t>(set)]; }
    float* row(int64_t set, int64_t panel, int64_t j) const { return panels.row(panel, set * padded + j); }

    bool is_one_panel() const { return panels.count == 1; }

    /// out_nj = v_n . r_j for rows of v and reference points [from, to). `scratch` is as large as `out`.
    void dots(int64_t set, const Panels& v, int64_t rows, int64_t from, int64_t to, double* out, float* scratch,
              int64_t out_pitch) const {
        for (int64_t p = 0; p < panels.count; ++p) {
            panel_dots(set, p, v, rows, from, to, scratch, out_pitch);
            for (int64_t n = 0; n < rows; ++n) {
                double* total = out + n * out_pitch;
                const float* part = scratch + n * out_pitch;
                for (int64_t j = 0; j < to - from; j += LANES) {
                    const Vec added = widen(part + j);
                    store(total + j, p == 0 ? added : load(total + j) + added);
                }
            }
        }
    }

    /// Inner products over one panel, in float32.
    __attribute__((noinline)) void panel_dots(int64_t set, int64_t panel, const Panels& v, int64_t rows, int64_t from,
                                              int64_t to, float* out, int64_t out_pitch) const {
        for (int64_t j = from; j < to; j += 8) {
            int64_t n = 0;
            const auto pairs = [&](auto height) {
                constexpr int HERE = decltype(height)::value;
                for (; n + HERE <= rows; n += HERE)
                    for (int64_t u = j; u < j + 8; u += 4)
                        products<HERE>(v.row(panel, n), row(set, panel, u), panels.width(panel),
                                       out + n * out_pitch + u - from, out_pitch);
            };
            pairs(std::integral_constant<int, QUERIES>{});
            pairs(std::integral_constant<int, 2>{});
            pairs(std::integral_constant<int, 1>{});
        }
    }

    const int64_t M, D, padded, tile;
    Panels panels;

private:
    double& part(int64_t panel, int64_t set, int64_t j) const {
        return parts_[(panel * static_cast<int64_t>(points_.size()) + set) * padded + j];
    }

    /// The median of five of the reference points: no outlier moves it, and centering then costs no digits.
    void choose_origin(int64_t set, int64_t first) const {
        const int64_t last = std::min(first + PANEL, D);
        float* origin = origin_.get() + set * D;
        double row[5][PANEL];
        for (int64_t i = 0; i < 5; ++i) points(set).read(i * (M - 1) / 4, first, last, row[i]);
        const auto low = [](double a, double b) { return a < b ? a : b; };
        const auto high = [](double a, double b) { return a < b ? b : a; };
        for (int64_t d = 0; d < last - first; ++d) {
            const double a = row[0][d], b = row[1][d], c = row[2][d], e = row[3][d];
            const double middle = high(low(a, b), low(c, e)), other = low(high(a, b), high(c, e));
            origin[first + d] = static_cast<float>(high(low(middle, other), low(high(middle, other), row[4][d])));
        }
    }

    void add_norms(int64_t set) {
        double widest = 0;
        for (int64_t j = 0; j < padded; ++j) {
            double total = 0;
            for (int64_t p = 0; p < panels.count; ++p) total += part(p, set, j);
            norm_[set * padded + j] = total;
            if (j < M && !(total <= widest)) widest = total;  // a NaN stays
        }
        widest_[static_cast<size_t>(set)] = std::sqrt(widest);
    }

    /// The products of HEIGHT rows and four reference points over one panel.
    template <int HEIGHT>
    void products(const float* x, const float* r, int64_t width, float* out, int64_t out_pitch) const {
        Floats total[HEIGHT][4] = {};
        for (int64_t d = 0; d < width; d += FLOATS) {
            Floats ref[4];
            FLUX_UNROLL for (int u = 0; u < 4; ++u) ref[u] = load(r + u * panels.pitch + d);
            FLUX_UNROLL for (int i = 0; i < HEIGHT; ++i) {
                const Floats query = load(x + i * panels.pitch + d);
                FLUX_UNROLL for (int u = 0; u < 4; ++u) total[i][u] += query * ref[u];
            }
        }
        FLUX_UNROLL for (int i = 0; i < HEIGHT; ++i) store_sums(total[i], out + i * out_pitch);
    }

    std::vector<Points> points_;
    std::vector<double> widest_;
    Buffer<float> origin_;
    Buffer<double> norm_, parts_;
};
