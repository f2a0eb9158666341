// The reference points of a density estimate, in layouts that make pairs (query, reference point) fast: few dimensions
// as doubles (columns.h) and as floats (float_columns.h), many as doubles (rows.h). Many dimensions as floats have
// kernels of their own (float_rows.h).
//
// Included inside of a target's namespace. Doubles are relative to the mean of a group's reference points: a common
// translation changes no result, but far from the origin it would cost digits. Distances are always sums of squared
// differences, never |a|^2 + |b|^2 - 2ab, so nothing cancels.
//
// All layouts offer the same operations on a few queries (rows) and a range of reference points [begin, end):
//   distances   a_nj = |x_n - r_j|^2
//   dots        v_n . r_j
//   moments     out_n += sum_j w_nj r_j
//   outer       out_j += sum_n w_nj v_n

/// Size of n doubles rounded up to an odd number of cache lines: rows a power of two apart would share few cache sets.
static int64_t odd_lines(int64_t n) {
    const int64_t lines = (n + 7) / 8;
    return 8 * (lines % 2 ? lines : lines + 1);
}

/// -log of the weight, relative to the largest of M weights, below which a weight may be dropped: all M together are
/// then below rounding in double.
static double log_of_least_weight(int64_t M) { return 42 + std::log(static_cast<double>(M)); }

/// Input of a layout: sets of reference points, with raw coordinates [sets, count, dimensions] computed when needed.
struct Source {
    int64_t sets, count, dimensions;
    /// Writes coordinates [first, last) of all reference points of a set into rows `pitch` apart.
    std::function<void(int64_t set, int64_t first, int64_t last, double* out, int64_t pitch)> read;
    /// The distance from which on no query of a set, by its distance alone, gives a weight above e^-cut.
    std::function<double(int64_t set, double cut)> reach;
    /// Optional: adds the displacement of the reference points from the points read. It runs on coordinates relative to
    /// the origin, where it costs no digits.
    std::function<void(int64_t set, int64_t first, int64_t last, double* out, int64_t pitch)> move{};

    /// Index of the set of group b: its own, or the only one.
    int64_t set_of(int64_t b) const { return sets == 1 ? 0 : b; }
};

/// Whether a layout is one of weighting.h.
template <class Refs>
constexpr bool is_weighted = false;

/// Limits within which no product of floats overflows or becomes denormal: of coordinates and of sigma^2.
constexpr double LARGEST = 1e15, LEAST_VARIANCE = 1e-24, LARGEST_VARIANCE = 1e24;
static bool fits_float(double variance) { return variance >= LEAST_VARIANCE && variance <= LARGEST_VARIANCE; }

constexpr double LOG2_E = 1.4426950408889634;

/// The weight e^{-(a - least) scale} of a squared distance a, or 0 where it is below e^-cut, for vectors of floats.
class FloatWeight {
public:
    FloatWeight(double least, double scale, double cut)
        : least_(broadcast(static_cast<float>(least))),
          scale_(broadcast(static_cast<float>(std::min(scale * LOG2_E, 1e37)))),
          limit_(broadcast(static_cast<float>(-cut * LOG2_E))) {}
    __attribute__((always_inline)) Floats operator()(Floats a) const {
        const Floats y = (least_ - a) * scale_;
        return y > limit_ ? normal_power_of_two(y) : Floats{};
    }

private:
    Floats least_, scale_, limit_;
};

#include "product.h"

#include "cells.h"

#include "columns.h"

#include "float_columns.h"

#include "rows.h"
