// Products of weights and rows, for the layout of many dimensions.
//
// Included inside of a target's namespace.

/// Adds to `out` [P, width] the product of weights [P, K] and rows [K, width], one register tile at a time. A register
/// tile whose weights are all 0 costs nothing.
class Product {
public:
    /// Allocates room for P x K weights, P and K in either order.
    Product(int64_t P, int64_t K)
        : weights_(round_up(std::max(P, K), HEIGHT) * INNER),
          index_(round_up(std::max(P, K), HEIGHT) / HEIGHT * INNER),
          used_(std::max(P, K) / HEIGHT + 1) {}

    /// weight(p, k) = w[p * row_stride + k * inner_stride]
    void accumulate(const double* w, int64_t row_stride, int64_t inner_stride, int64_t P, int64_t K, const double* rows,
                    int64_t pitch, int64_t width, double* out, int64_t out_pitch) {
        for (int64_t k = 0; k < K; k += INNER) {
            gather(w + k * inner_stride, row_stride, inner_stride, P, std::min(INNER, K - k));
            const double* from = rows + k * pitch;
            int64_t d = 0;
            for (; d + WIDTH * LANES <= width; d += WIDTH * LANES)
                columns<WIDTH>(P, from + d, pitch, out + d, out_pitch);
            for (; d < width; d += LANES) columns<1>(P, from + d, pitch, out + d, out_pitch);
        }
    }

private:
    // Rows processed at once: a column of their register tiles, 256 bytes each, stays in a first-level cache.
    static constexpr int64_t INNER = 128;

    /// Packs the weights of each tile of rows side by side, with the indices k at which one of them is not 0.
    __attribute__((noinline)) void gather(const double* w, int64_t row_stride, int64_t inner_stride, int64_t P,
                                          int64_t K) {
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
    __attribute__((noinline)) void columns(int64_t P, const double* rows, int64_t pitch, double* out,
                                           int64_t out_pitch) {
        for (int64_t p = 0; p < P; p += HEIGHT) {
            const int64_t tile = p / HEIGHT, height = std::min<int64_t>(HEIGHT, P - p);
            const double* w = weights_.get() + tile * HEIGHT * INNER;
            const int32_t* index = index_.get() + tile * INNER;
            Vec total[HEIGHT][VECTORS] = {};
            for (int64_t k = 0; k < used_[tile]; ++k) {
                const double* row = rows + index[k] * pitch;
                FLUX_UNROLL for (int i = 0; i < HEIGHT; ++i) FLUX_UNROLL for (int u = 0; u < VECTORS; ++u)
                    total[i][u] += w[k * HEIGHT + i] * load(row + u * LANES);
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
