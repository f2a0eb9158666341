// Products of weights and rows of floats, for the layout of many dimensions.
//
// Included inside of a target's namespace.

/// Adds to rows of panels the products of weights and other rows, one register tile at a time. Rows k whose weights in
/// a tile are all 0 cost nothing. Sums of INNER terms are added to those before, so that rounding grows slowly.
class FloatProduct {
public:
    /// For at most P rows of results.
    explicit FloatProduct(int64_t P) : index_(((P + HEIGHT - 1) / HEIGHT) * INNER), used_((P + HEIGHT - 1) / HEIGHT) {}

    /// out_p += sum_k w[p * row_stride + k * inner_stride] rows_{first + k}
    void add(const float* w, int64_t row_stride, int64_t inner_stride, int64_t P, int64_t K, const Panels& rows,
             int64_t first, const Panels& out, int64_t first_out) {
        w_ = w;
        row_stride_ = row_stride;
        inner_stride_ = inner_stride;
        for (int64_t k = 0; k < K; k += INNER) {
            const int64_t count = std::min(INNER, K - k);
            const bool dense = find_used(P, k, count);
            if (const MatrixProduct multiply = dense ? matrix_product() : nullptr) {
                with_blas(multiply, P, k, count, rows, first, out, first_out);
                continue;
            }
            for (int64_t panel = 0; panel < rows.count; ++panel) {
                const float* from = rows.row(panel, first + k);
                float* to = out.row(panel, first_out);
                int64_t d = 0;
                for (; d + VECTORS * FLOATS <= rows.width(panel); d += VECTORS * FLOATS)
                    columns<VECTORS>(P, k, from + d, rows.pitch, to + d, out.pitch);
                for (; d < rows.width(panel); d += FLOATS) columns<1>(P, k, from + d, rows.pitch, to + d, out.pitch);
            }
        }
    }

private:
    static constexpr int64_t INNER = 256;
    static constexpr int HEIGHT = FLUX_REGISTERS >= 32 ? 6 : 4;
    static constexpr int VECTORS = FLUX_REGISTERS >= 32 ? 4 : 2;

    void with_blas(MatrixProduct multiply, int64_t P, int64_t begin, int64_t count, const Panels& rows, int64_t first,
                   const Panels& out, int64_t first_out) const {
        // Its matrices are stored by columns: it computes the transpose of all.
        const bool by_rows = inner_stride_ == 1;
        const char plain = 'N', weights = by_rows ? 'N' : 'T';
        const float one = 1;
        const int n = static_cast<int>(P), k = static_cast<int>(count), pitch = static_cast<int>(rows.pitch),
                  out_pitch = static_cast<int>(out.pitch),
                  w_pitch = static_cast<int>(by_rows ? row_stride_ : inner_stride_);
        for (int64_t panel = 0; panel < rows.count; ++panel) {
            const int width = static_cast<int>(rows.width(panel));
            multiply(&plain, &weights, &width, &n, &k, &one, rows.row(panel, first + begin), &pitch,
                     w_ + begin * inner_stride_, &w_pitch, &one, out.row(panel, first_out), &out_pitch);
        }
    }

    /// The indices k in [begin, begin + count) at which a tile of rows has a weight other than 0; whether most are
    /// such.
    bool find_used(int64_t P, int64_t begin, int64_t count) {
        int64_t all = 0;
        for (int64_t p = 0; p < P; p += HEIGHT) {
            const int64_t height = std::min<int64_t>(HEIGHT, P - p);
            uint32_t any[INNER] = {};
            const float* w = w_ + p * row_stride_ + begin * inner_stride_;
            for (int64_t i = 0; i < height; ++i)
                for (int64_t k = 0; k < count; ++k) any[k] |= w[i * row_stride_ + k * inner_stride_] != 0;
            int32_t* index = index_.get() + p / HEIGHT * INNER;
            int64_t used = 0;
            for (int64_t k = 0; k < count; ++k) {
                index[used] = static_cast<int32_t>(k);
                used += any[k];
            }
            used_[p / HEIGHT] = used;
            all += used * height;
        }
        return 4 * all > 3 * P * count;
    }

    template <int WIDTH>
    __attribute__((noinline)) void columns(int64_t P, int64_t begin, const float* rows, int64_t pitch, float* out,
                                           int64_t out_pitch) const {
        int64_t p = 0;
        for (; p + HEIGHT <= P; p += HEIGHT) tile<WIDTH, HEIGHT>(p, begin, rows, pitch, out, out_pitch);
        for (; p < P; ++p) tile<WIDTH, 1>(p, begin, rows, pitch, out, out_pitch);
    }

    template <int WIDTH, int ROWS>
    void tile(int64_t p, int64_t begin, const float* rows, int64_t pitch, float* out, int64_t out_pitch) const {
        const float* w = w_ + p * row_stride_ + begin * inner_stride_;
        const int32_t* index = index_.get() + p / HEIGHT * INNER;
        const int64_t used = used_[p / HEIGHT];
        if (used == 0) return;
        Floats total[ROWS][WIDTH] = {};
        for (int64_t k = 0; k < used; ++k) {
            const float *row = rows + index[k] * pitch, *factor = w + index[k] * inner_stride_;
            Floats vector[WIDTH];
            FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) vector[u] = load(row + u * FLOATS);
            FLUX_UNROLL for (int i = 0; i < ROWS; ++i) {
                const Floats weight = broadcast(factor[i * row_stride_]);
                FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) total[i][u] += weight * vector[u];
            }
        }
        FLUX_UNROLL for (int i = 0; i < ROWS; ++i) FLUX_UNROLL for (int u = 0; u < WIDTH; ++u) {
            float* to = out + (p + i) * out_pitch + u * FLOATS;
            store(to, load(to) + total[i][u]);
        }
    }

    const float* w_ = nullptr;
    int64_t row_stride_ = 0, inner_stride_ = 0;
    Buffer<int32_t> index_;
    Buffer<int64_t> used_;
};
