// Weights of reference points in many dimensions for arguments in float32 that are not those of distances alone; see
// weighting.h.
//
// Included inside of a target's namespace.

/// Numbers of one group of reference points: y_j = bias_j - scale_n t_j g_j in units of log 2, where g is the squared
/// distance or, for the Laplace kernel, the distance.
struct FloatWeighting {
    FloatWeighting(const AverageArguments& args, int64_t b, int64_t padded)
        : laplace(args.laplace),
          has_bias(args.log_weights),
          has_factor(args.per_reference),
          has_values(args.values),
          excludes(args.exclude_self),
          width(args.width),
          values(has_values ? padded : 0, args.width),
          bias_(has_bias ? padded : 1),
          factor_(has_factor ? padded : 1) {
        const int64_t M = args.shape.M;
        if (has_bias) {
            args.log_weights.at(b).load(M, 1, bias_.get(), 1);
            top = std::max(*std::max_element(bias_.get(), bias_.get() + M), -std::numeric_limits<double>::max());
            for (int64_t j = 0; j < M; ++j) bias_[j] = (bias_[j] - top) * LOG2_E;
            std::fill(bias_.get() + M, bias_.get() + padded, -INFINITY);
        }
        if (has_factor) {
            args.sigma2.at(b).load(M, 1, factor_.get(), 1);
            for (int64_t j = 0; j < M; ++j) {
                fits = fits && fits_float(factor_[j]);
                factor_[j] = scale_of(factor_[j]);
            }
            std::fill(factor_.get() + M, factor_.get() + padded, 1.0);
            largest_factor = *std::max_element(factor_.get(), factor_.get() + M);
        }
        if (!has_values) return;
        Buffer<float> zero(width);
        std::fill_n(zero.get(), width, 0.0f);
        const Points points{args.values.at(b)};
        for (int64_t j = 0; j < M; ++j)
            for (int64_t p = 0; p < values.count; ++p) values.center(points, j, p, zero.get(), j);
        for (int64_t j = M; j < padded; ++j) values.clear(j);
    }

    double scale_of(double variance) const { return laplace ? 1 / std::sqrt(variance) : 0.5 / variance; }
    const double* bias() const { return has_bias ? bias_.get() : nullptr; }
    const double* factor() const { return has_factor ? factor_.get() : nullptr; }

    /// The logit of reference point j at a squared distance, and the reverse.
    double logit(int64_t j, double scale, double square) const {
        const double drop = (laplace ? std::sqrt(square) : square) * scale * (has_factor ? factor_[j] : 1);
        return has_bias ? bias_[j] - drop : -drop;
    }
    double square(int64_t j, double scale, double logit) const {
        const double g = ((has_bias ? bias_[j] : 0) - logit) / (scale * (has_factor ? factor_[j] : 1));
        return laplace ? g * g : g;
    }
    bool is_absent(int64_t j) const { return has_bias && bias_[j] == -INFINITY; }
    /// The most that a logit changes with a squared distance that is at least `nearest`.
    double slope(double scale, double nearest) const {
        return scale * largest_factor / (laplace ? 2 * std::sqrt(nearest) : 1);
    }

    const bool laplace, has_bias, has_factor, has_values, excludes;
    bool fits = true;  // whether the bandwidths are in the range of floats
    double top = 0;    // what logits are less, in nats
    double largest_factor = 1;
    const int64_t width;
    Panels values;

private:
    Buffer<double> bias_, factor_;
};
