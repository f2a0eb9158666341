// Weights of reference points that are not those of distances alone: a layout with log-weights, another kernel, own
// indices left out, and values to average.
//
// Included inside of a target's namespace. With logits b_j - s g_j, where g is the squared distance or, for the Laplace
// kernel, the distance, and s = scale_n t_j with t_j = 1 or of the reference point, a query sees the adjusted distances
// g_j t_j - b_j/scale_n, infinite for what is absent. All that follows distances stays as it is: the least of them, the
// weights e^{-(a - least) scale}, their sums.

/// Whether all groups have the same reference points with the same weights and values.
static bool are_shared(const AverageArguments& args) {
    const bool variances = !args.per_reference || args.sigma2.stride[0] == 0;
    return args.refs.stride[0] == 0 && args.values.stride[0] == 0 && args.log_weights.stride[0] == 0 && variances;
}

template <class Layout>
class Weighted : public Layout {
public:
    using Number = typename Layout::Number;
    using Layout::distances;
    static constexpr bool IN_FLOAT = std::is_same_v<Number, float>;

    Weighted(const AverageArguments& args, const Source& source)
        : Layout(source, args.threads, args.values ? args.width : 0),
          width_(args.width),
          has_values_(args.values),
          has_logs_(args.log_weights),
          per_reference_(args.per_reference),
          laplace_(args.laplace),
          groups_(are_shared(args) ? 1 : args.shape.B),
          bias_(has_logs_ ? groups_ * this->padded : 1),
          narrow_bias_(has_logs_ && IN_FLOAT ? groups_ * this->padded : 1),
          factor_(per_reference_ ? groups_ * this->padded : 1),
          top_(groups_),
          least_factor_(groups_),
          values_(has_values_ ? groups_ * this->values_size(width_) : 1),
          zeros_(width_),
          place_(args.exclude_self ? source.sets * this->M : 0) {
        std::fill_n(zeros_.get(), width_, 0.0);
        parallel_for(groups_, args.threads, [&](int64_t group) { pack(args, source.set_of(group), group); });
        for (int64_t set = 0; args.exclude_self && set < source.sets; ++set)
            for (int64_t j = 0; j < this->M; ++j) place_[set * this->M + this->source_index(set, j)] = j;
        excludes_ = args.exclude_self;
    }

    bool has_values() const { return has_values_; }
    int64_t average_pitch() const { return has_values_ ? odd_lines(width_) : this->pitch; }
    int64_t outer_of_values() const { return has_values_ ? this->outer_size(width_) : 0; }
    bool laplace() const { return laplace_; }
    /// t_j of a group, null for 1.
    const double* factors(int64_t group) const {
        return per_reference_ ? factor_.get() + own(group) * this->padded : nullptr;
    }
    double scale_of(double variance) const { return laplace_ ? 1 / std::sqrt(variance) : 0.5 / variance; }
    /// The number by which all logits of a group are less.
    double top(int64_t group) const { return top_[own(group)]; }

    void window(int64_t group, int64_t set, int64_t query, const double* x, double scale, int64_t& begin,
                int64_t& end) const {
        constexpr int64_t FEW = IN_FLOAT ? FLOATS : LANES;
        const auto reach = [&](const auto* squares, int64_t place) {
            double near[FEW];
            for (int64_t j = 0; j < FEW; ++j) near[j] = static_cast<double>(squares[j]) * (IN_FLOAT ? 1.00001 : 1);
            adjust(group, set, query, scale, place, place + FEW, near);
            const double least = *std::min_element(near, near + FEW);
            // No log-weight is above 0 here: no logit beyond that distance is above that of the heaviest less `cut`.
            const double excess = (least + this->cut() / scale) / least_factor_[own(group)];
            return laplace_ ? excess : std::sqrt(excess);
        };
        Layout::window(set, x, reach, begin, end);
    }

    /// Adjusts the squared distances a of a query to reference points [begin, end).
    void adjust(int64_t group, int64_t set, int64_t query, double scale, int64_t begin, int64_t end, double* a) const {
        const int64_t from = own(group) * this->padded + begin, n = end - begin;
        if (laplace_)
            for (int64_t j = 0; j < n; ++j) a[j] = std::sqrt(a[j]);
        const double *t = factor_.get() + from, *b = bias_.get() + from, across = 1 / scale;
        if (per_reference_)
            for (int64_t j = 0; j < n; ++j) a[j] *= t[j];
        if (has_logs_)
            for (int64_t j = 0; j < n; ++j) a[j] -= b[j] * across;
        // Padding may be a copy of the query's own point.
        for (int64_t j = std::max(this->M, begin); j < end; ++j) a[j - begin] = INFINITY;
        leave_out(set, query, begin, end, a);
    }

    /// Adjusted distances in float, as `FloatColumns::distances`.
    double distances(int64_t group, int64_t set, int64_t query, const double* x, int64_t begin, int64_t end,
                     double scale, double least, float* a, double& base, bool& far) const {
        const float* bias = has_logs_ ? narrow_bias_.get() + own(group) * this->padded + begin : nullptr;
        const typename Layout::Reduction reduction{bias, static_cast<float>(1 / scale)};
        const typename Layout::Split split(x, this->D);
        double here;
        if (laplace_ || per_reference_) {
            this->near_distances(set, split, begin, end, a);
            leave_out(set, query, begin, end, a);
            here = adjust_floats(group, reduction, begin, end, a);
        } else {
            here = this->near_distances(set, split, begin, end, a, reduction);
            if (leave_out(set, query, begin, end, a)) here = lowest_of(a, end - begin);
        }
        base = 0;
        // The heaviest logit says how far those are, at most, that matter.
        far = !(std::min(here, least) * scale <= Layout::FAR / 2) || (!has_values_ && this->is_outside(set, x, begin));
        if (!far) return here;
        double exact[Layout::MOST_IN_TILE];
        this->far_distances(set, x, begin, end, exact);
        adjust(group, set, query, scale, begin, end, exact);
        const double low = lowest_of(exact, end - begin);
        base = low < INFINITY ? low : 0;
        this->narrow_differences(exact, end - begin, base, a);
        return low;
    }

    double weigh(int64_t group, int64_t set, const double* x, int64_t begin, int64_t end, double least, double scale,
                 const float* a, double* moment) const {
        if (!has_values_) return Layout::weigh(set, x, begin, end, least, scale, a, moment);
        return this->weigh_columns(values(group) + begin, width_, zeros_.get(), end - begin, least, scale, a, moment);
    }
    bool weighs_at_once() const { return width_ <= Layout::MOST_AT_ONCE; }

    /// out_n += sum_j w_nj values_j
    void average(int64_t group, const Number* w, int64_t rows, int64_t begin, int64_t end, int64_t w_pitch, bool far,
                 double* out, Product& product) const {
        if constexpr (IN_FLOAT) {
            this->add_sums(values(group) + begin, width_, w, zeros_.get(), end - begin, far, out);
        } else {
            this->value_sums(values(group), width_, w, rows, begin, end, w_pitch, out, average_pitch(), product);
        }
    }

    /// p_nj = v_n . values_j - less_n for rows v
    void dots_with_values(int64_t group, const double* v, int64_t rows, int64_t begin, int64_t end, bool far,
                          const double* less, Number* p, int64_t p_pitch) const {
        if constexpr (IN_FLOAT) {
            this->dots_of(values(group) + begin, width_, v, zeros_.get(), end - begin, far, less[0], p);
        } else {
            this->value_dots(values(group), width_, v, rows, begin, end, average_pitch(), p, p_pitch);
            for (int64_t n = 0; n < rows; ++n)
                for (int64_t j = 0; j < end - begin; ++j) p[n * p_pitch + j] -= less[n];
        }
    }

    /// Squared distances to a query in float, or in double where it is far.
    void squares(int64_t set, const double* x, int64_t begin, int64_t end, float* a) const {
        this->near_distances(set, typename Layout::Split(x, this->D), begin, end, a);
    }

private:
    int64_t own(int64_t group) const { return groups_ == 1 ? 0 : group; }
    const Number* values(int64_t group) const { return values_.get() + own(group) * this->values_size(width_); }

    void pack(const AverageArguments& args, int64_t set, int64_t group) {
        Buffer<double> numbers(this->M);
        top_[group] = 0;
        least_factor_[group] = 1;
        if (has_logs_) {
            args.log_weights.at(group).load(this->M, 1, numbers.get(), 1);
            const double top = *std::max_element(numbers.get(), numbers.get() + this->M);
            top_[group] = top > -INFINITY ? top : 0;
            double* bias = bias_.get() + group * this->padded;
            for (int64_t j = 0; j < this->M; ++j) bias[j] = numbers[this->source_index(set, j)] - top_[group];
            std::fill(bias + this->M, bias + this->padded, -INFINITY);
            if constexpr (IN_FLOAT) {
                float* narrow_bias = narrow_bias_.get() + group * this->padded;
                for (int64_t j = 0; j < this->padded; ++j) narrow_bias[j] = static_cast<float>(bias[j]);
            }
        }
        if (per_reference_) {
            args.sigma2.at(group).load(this->M, 1, numbers.get(), 1);
            double* factor = factor_.get() + group * this->padded;
            for (int64_t j = 0; j < this->padded; ++j)
                factor[j] = scale_of(numbers[this->source_index(set, std::min(j, this->M - 1))]);
            least_factor_[group] = *std::min_element(factor, factor + this->M);
        }
        if (has_values_)
            this->pack_values(set, args.values.at(group), width_, values_.get() + group * this->values_size(width_));
    }

    /// Makes the distance to a query's own point infinite; returns whether that is in [begin, end).
    template <class Any>
    bool leave_out(int64_t set, int64_t query, int64_t begin, int64_t end, Any* a) const {
        if (!excludes_) return false;
        const int64_t place = place_[set * this->M + query];
        if (place < begin || place >= end) return false;
        a[place - begin] = INFINITY;
        return true;
    }

    /// `adjust` in float, but for own points; returns the least.
    template <class Reduction>
    double adjust_floats(int64_t group, Reduction reduction, int64_t begin, int64_t end, float* a) const {
        const int64_t n = end - begin;
        if (laplace_)
            for (int64_t j = 0; j < n; ++j) a[j] = std::sqrt(a[j]);
        if (per_reference_) {
            const double* t = factors(group) + begin;
            for (int64_t j = 0; j < n; ++j) a[j] *= static_cast<float>(t[j]);
        }
        if (reduction.numbers)
            for (int64_t j = 0; j < n; ++j) a[j] -= reduction.numbers[j] * reduction.factor;
        return lowest_of(a, n);
    }

    const int64_t width_;
    const bool has_values_, has_logs_, per_reference_, laplace_;
    bool excludes_ = false;
    const int64_t groups_;
    Buffer<double> bias_;  // [groups, padded]: log-weights less the largest
    Buffer<float> narrow_bias_;
    Buffer<double> factor_;              // [groups, padded]: t
    Buffer<double> top_, least_factor_;  // [groups]: the largest log-weight, the least t
    Buffer<Number> values_;
    Buffer<double> zeros_;   // [V]: the point that sums of values are taken about
    Buffer<int64_t> place_;  // [sets, M]: that of a reference point by its index
};
template <class Layout>
constexpr bool is_weighted<Weighted<Layout>> = true;
