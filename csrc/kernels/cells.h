// Order of reference points in few dimensions, and the window of them that can matter to a query.
//
// Included inside of a target's namespace.

/// Where a group is wide compared with the bandwidth, its reference points are put into M equal cells along its widest
/// coordinate, in the order of the cells. A query then needs only the window of reference points whose weight can be
/// above rounding, which a bound on that coordinate proves.
class Cells {
public:
    /// Orders the points of rows [M, D]; `finite` is false where numbers have no order. `reach` is the
    /// distance from which on weights may be dropped.
    void sort(const double* rows, int64_t M, int64_t D, bool finite, double reach, int32_t* order, int32_t* first) {
        M_ = M;
        first_ = first;
        double range = 0;
        for (int64_t d = 0; d < D; ++d) {
            double least = INFINITY, most = -INFINITY;
            for (int64_t j = 0; j < M; ++j) {
                least = std::min(least, rows[j * D + d]);
                most = std::max(most, rows[j * D + d]);
            }
            finite = finite && std::isfinite(most - least);
            diameter += (most - least) * (most - least);
            if (most - least > range) {
                range = most - least;
                coordinate = static_cast<int32_t>(d);
                least_ = least;
                per_unit_ = M / range;
            }
        }
        // Windows pay off if one leaves out half of the range; it is 2 reach wide for a query in the middle.
        if (!finite || M < 64 || range < 4 * reach) coordinate = -1;
        if (coordinate < 0)
            for (int64_t j = 0; j < M; ++j) order[j] = static_cast<int32_t>(j);
        else
            sort_by_cell(rows, D, order);
    }

    /// The cell of a value, at least 0 and below M.
    int64_t cell(double value) const {
        const double place = (value - least_) * per_unit_;
        return place > 0 ? static_cast<int64_t>(std::min(place, static_cast<double>(M_ - 1))) : 0;
    }
    /// The places [begin, end), multiples of `lanes`, of all points that can matter to a query x. reach_at(place) is
    /// the distance from which on no point can, found from the `lanes` points at that place: the weight of the heaviest
    /// of a few points bounds that of the heaviest of all.
    template <class ReachAt>
    void window(const double* x, int64_t lanes, int64_t padded, ReachAt reach_at, int64_t& begin, int64_t& end) const {
        begin = 0;
        end = padded;
        if (coordinate < 0) return;
        const double at = x[coordinate], reach = reach_at(place_before(at, lanes));
        begin = place_before(at - reach, lanes);
        end = std::max(round_up(first_[cell(at + reach) + 1], lanes), begin + lanes);
    }

    int32_t coordinate = -1;  // that of the cells; -1: none, the order is that of the source
    double diameter = 0;      // squared, of a box around the points

private:
    /// A multiple of `lanes` near the place of a value, and below M.
    int64_t place_before(double value, int64_t lanes) const {
        return std::min<int64_t>(first_[cell(value)], M_ - 1) / lanes * lanes;
    }

    /// Fills `order` with the points cell by cell, and `first_` with the first place of each cell.
    void sort_by_cell(const double* rows, int64_t D, int32_t* order) const {
        Buffer<int32_t> where(M_);
        std::fill_n(first_, M_ + 1, 0);
        for (int64_t j = 0; j < M_; ++j) {
            where[j] = static_cast<int32_t>(cell(rows[j * D + coordinate]));
            ++first_[where[j] + 1];
        }
        for (int64_t c = 0; c < M_; ++c) first_[c + 1] += first_[c];
        for (int64_t j = 0; j < M_; ++j) order[first_[where[j]]++] = static_cast<int32_t>(j);
        // Each entry is now at the end of its cell, where the next cell begins.
        std::copy_backward(first_, first_ + M_, first_ + M_ + 1);
        first_[0] = 0;
    }

    int64_t M_ = 0;
    int32_t* first_ = nullptr;  // [M + 1]
    double least_ = 0, per_unit_ = 0;
};
