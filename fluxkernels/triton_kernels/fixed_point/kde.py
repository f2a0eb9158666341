"""Weights of reference points from exact inner products, the coefficients of derivatives, and the results of both.

Weights are float32, from exact differences of logits. A row whose weights are sensitive to the rounding of coordinates
to words is computed again from float64 differences of coordinates. Coefficients are words, relative to the heaviest
reference point h: with the coefficient of h replaced by minus the sum of all others, Σ_j c_j r_j is Σ_j c_j (r_j - r_h)
exactly, wherever the origin is.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: C901, PLR0912, PLR0913, PLR0915
import triton
import triton.language as tl

from fluxkernels.triton_kernels.differences import load_refs, load_row, load_tile, squared_distances
from fluxkernels.triton_kernels.fixed_point.numbers import (
    LOWEST,
    ONE,
    as_long,
    digits,
    exponent_above,
    is_finite,
    nearest_word,
    power_of_two,
    power_of_two_single,
    word_of,
)
from fluxkernels.triton_kernels.fixed_point.points import pull_of
from fluxkernels.triton_kernels.scalars import normalized_log_density, one_minus_exp, rounded

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Largest effect of rounded coordinates on a weight; above it the weights of a row are computed in float64.
TOLERANCE = tl.constexpr(3e-7)
# Rounding of coordinates in units of σ, above which sums of points with coefficients are float64 sums of differences.
COARSE = tl.constexpr(1e-7)


@triton.jit
def rounding_of_logits(e_x, e_refs, distance, D, variance):
    """Estimated error of a difference of logits if both points of a pair are `distance` apart, for exponents e.

    Coordinates are rounded by 2^(e-31) at most, 0.3·2^(e-30) on average, in directions that do not depend on those of
    differences of points. The digits that products leave out are 30 units per dimension on average, of random sign.
    """
    coordinates = 0.6 * (power_of_two(e_x - 30) + power_of_two(e_refs - 30)) * distance
    units = 44 * tl.sqrt(tl.zeros([], tl.float64) + D) * power_of_two(e_x + e_refs - 44)
    return (coordinates + units) / variance


@triton.jit
def squares_to(
    x, n, x_n, x_d, refs, r_m, r_d, move, m_m, m_d, pull, h, N, M, D,
    MOVED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """|x_n - r_h|² of ROWS queries and a reference point of each, from differences in float64."""
    total = tl.zeros([ROWS, DEPTH], tl.float64)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        ref = load_refs(refs, r_m, r_d, move, m_m, m_d, pull, h, M, d, D, MOVED)
        difference = load_tile(x, n, x_n, N, d, x_d, D) - ref
        total += difference * difference
    return tl.sum(total, 1)


@triton.jit
def store_weight_words(
    logits, words, scales, row, h, total, M, width, known,
    RELATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the weights 2^logit over their total as words; with RELATIVE, as coefficients relative to the heaviest
    reference point, and in `scales` 1 over the sum of the words of all weights."""
    tl.debug_barrier()
    scale = ((1 / total) * ONE)[:, None]
    used = tl.zeros([ROWS], tl.int32)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + j[None, :], mask=(j < M)[None, :], other=float("-inf"))
        other = j[None, :] != h[:, None]
        word = tl.where(other, nearest_word(tl.exp2(logit) * scale), 0)
        used += tl.sum(word, 1)
        tl.store(words + j[None, :], digits(word), mask=(j < width)[None, :] & other & known[:, None])
    if RELATIVE:
        whole = (used + nearest_word(scale.reshape(ROWS))).to(tl.float64)
        tl.store(scales + row, power_of_two(as_long(30)) / whole, mask=known)
    word = digits(-used if RELATIVE else -(used - ONE))
    tl.store(words + h[:, None], word[:, None], mask=known[:, None])


@triton.jit
def weights_kernel(
    products, halves, exponents, valid_queries,
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, move, m_b, m_m, m_d, sigma2, s_b, s_n, tau, a_b,
    logits, words, scales, totals, heaviest, least, log_density, sensitive,
    N, M, D, width,
    MOVED: tl.constexpr, KDE: tl.constexpr, WORDS: tl.constexpr, RELATIVE: tl.constexpr, REPAIR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weights softmax_j(-|x - r_j|²/2σ²) of ROWS queries, and with KDE log p̂.

    `logits` `[B, N, M]` are in powers of two, relative to that of the heaviest reference point; `totals` the sums of
    the weights 2^logit (NaN where a point is not finite); `least` is the squared distance to the heaviest point. With
    WORDS, normalized weights go to `words` `[B, N, width]` too; with RELATIVE, as coefficients relative to the heaviest
    point, and `scales` is 1 over the sum of the words of all weights: equal weights are rounded in the same direction.

    With MOVED, reference points are the means of a transition, and the variance is σ²(1-e^{-2τ}), at least rounding:
    τ = 0 then gives the limit. `sensitive` `[B, N]` are the queries that REPAIR (with one row) computes again; it uses
    their products as memory for float64 distances.
    """
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    known = n < N
    n = tl.minimum(n, N - 1)  # loads need no mask
    row = b * N + n
    if REPAIR:
        if tl.max(tl.load(sensitive + row), 0) == 0:
            return
    products += row[:, None] * M
    halves += b * M
    x += b * x_b
    refs += b * r_b
    move += b * m_b
    variance = tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64)
    pull = pull_of(tau + b * a_b, MOVED)
    # Minima and maxima would lose NaN.
    valid = tl.load(valid_queries + row) + (variance * 0 + pull * 0).to(tl.float32)
    if MOVED:
        # At least 1e-290, whose inverse is finite.
        rest_of_time = tl.maximum(one_minus_exp(2 * tl.load(tau + b * a_b).to(tl.float64)), 4.930380657631324e-32)
        variance = tl.maximum(variance * rest_of_time, 1e-290)
    e_x, e_refs = tl.load(exponents + 2 * b), tl.load(exponents + 2 * b + 1)
    # Logits per unit of a product, or per squared distance.
    unit = tl.minimum(power_of_two(e_x + e_refs - 44) * LOG2_E / variance, 1e38).to(tl.float32)[:, None]
    per_square = ((1 / variance) * (0.5 * LOG2_E))[:, None]

    # The heaviest reference point; its logit is 0, as are those of others as near.
    nearest = tl.full([ROWS], float("inf"), tl.float64)
    top = tl.full([ROWS], LOWEST, tl.int64)
    if REPAIR:
        for start in range(0, M, 64):
            j = start + tl.arange(0, 64)
            first = x + tl.sum(n, 0) * x_n
            a = squared_distances(first, x_d, refs, r_m, r_d, move, m_m, m_d, pull, j, M, D, MOVED, DEPTH)[None, :]
            tl.store(products + j[None, :], a.to(tl.int64, bitcast=True), mask=(j < M)[None, :])
            nearest = tl.minimum(nearest, tl.min(tl.where((j < M)[None, :], a, float("inf")), 1))
        tl.debug_barrier()
    else:
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            half = tl.load(halves + j, mask=j < M, other=0)
            u = tl.load(products + j[None, :], mask=(j < M)[None, :], other=0) - half[None, :]
            top = tl.maximum(top, tl.max(tl.where((j < M)[None, :], u, LOWEST), 1))

    h = tl.full([ROWS], 2**31 - 1, tl.int32)
    heavy = tl.zeros([ROWS], tl.float32)
    others = tl.zeros([ROWS], tl.float32)
    logits += row[:, None] * M
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = (j < M)[None, :]
        half = tl.load(halves + j, mask=j < M, other=0)
        valid += tl.sum(tl.where(half == -LOWEST, float("nan"), 0.0), 0)
        if REPAIR:
            a = tl.load(products + j[None, :], mask=inside, other=0).to(tl.float64, bitcast=True)
            logit = tl.minimum((nearest[:, None] - a) * per_square, 0.0).to(tl.float32)
        else:
            u = tl.load(products + j[None, :], mask=inside, other=0) - half[None, :]
            logit = (u - top[:, None]).to(tl.float32) * unit
        logit = tl.where(inside, logit, float("-inf"))
        tl.store(logits + j[None, :], logit, mask=inside & known[:, None])
        h = tl.minimum(h, tl.min(tl.where(logit == 0, j[None, :], 2**31 - 1), 1))
        heavy += tl.sum(tl.where(logit == 0, 1.0, 0.0), 1)
        others += tl.sum(tl.where(logit == 0, 0.0, tl.exp2(logit)), 1)
    h = tl.minimum(h, M - 1)  # of NaN
    others += heavy - 1
    total = 1 + others
    if not REPAIR:
        nearest = squares_to(
            x, n, x_n, x_d, refs, r_m, r_d, move, m_m, m_d, pull, h, N, M, D, MOVED, ROWS, DEPTH
        )  # fmt: skip

    tl.store(totals + row, total + valid, mask=known)
    tl.store(heaviest + row, h, mask=known)
    tl.store(least + row, nearest, mask=known)
    if not REPAIR:
        error = rounding_of_logits(e_x, e_refs, tl.sqrt(nearest + 20 * variance), D, variance)
        tl.store(sensitive + row, (error * (others / total) > TOLERANCE).to(tl.int32), mask=known)
    if KDE:
        log_p = normalized_log_density((total + valid).to(tl.float64), nearest, variance, M, D)
        tl.store(log_density + row, rounded(log_p, log_density.dtype.element_ty), mask=known)
    if WORDS:
        store_weight_words(
            logits, words + row[:, None] * width, scales, row, h, total, M, width, known, RELATIVE, ROWS, BLOCK
        )


@triton.jit
def too_coarse(e, variance, total):
    """Return whether words of 2^e are too coarse for sums relative to the heaviest point: in tight clusters far apart.

    `total` is the weight of all reference points in units of that of the heaviest.
    """
    # Coefficients of derivatives are weights times logits, at most about 40 times a weight that counts.
    others = tl.minimum(40 * (total - 1), 1.0)
    return 0.3 * power_of_two(e - 30) * others > COARSE * tl.sqrt(variance)


@triton.jit
def products_of_differences(products, unit, vector, v_d, refs, r_m, r_d, h, M, D):
    """Store the products of a vector with r_j - r_h, from float64 differences, in units of `products`."""
    for start in range(0, M, 16):
        j = start + tl.arange(0, 16)
        total = tl.zeros([16, 64], tl.float64)
        for first in range(0, D, 64):
            d = first + tl.arange(0, 64)
            base = load_row(refs + h.to(tl.int64) * r_m, d, r_d, D)
            difference = load_tile(refs, j, r_m, M, d, r_d, D) - base[None, :]
            total += load_row(vector, d, v_d, D)[None, :] * difference
        tl.store(products + j, tl.floor(tl.sum(total, 1) / unit + 0.5).to(tl.int64), mask=j < M)


@triton.jit
def moments_kernel(
    logits, totals, heaviest, least, along, exponents_x, exponents, valid_field,
    field, f_b, f_n, f_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n, g_log_density, g_b, g_n,
    words, scales, coefficients, sizes, g_sigma2, log_weights, l_b, l_m,
    N, M, D, width, dimensions,
    RESIDUAL: tl.constexpr, GIVEN: tl.constexpr, LOGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Coefficients of the reference points in a derivative, for one query, relative to the heaviest one.

    V_j are the products `along` of a field with the reference points, l_j the logits, and bars are means under w. The
    cotangent of the logit of reference point j is w_j (V_j - V̄ + g). With RESIDUAL, the coefficient is
    w_j (V_j - V̄ + 2g (l_j - l̄) + 2g), since -a_j/σ² is 2 l_j up to a constant, with a factor g, which is 1 unless
    GIVEN. Coefficients are `words` times
    2^(scale - 30). Without RESIDUAL, those divided by σ² go to `coefficients` `[B, N, M]` too, for the sum over
    queries, and their largest magnitudes to `sizes`. g is then the cotangent of a log-density whose normalization has
    σ^-`dimensions`. With LOGS, logits are those of reference points with log weights.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    along += row * M
    variance = tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64)
    h = tl.load(heaviest + row)
    exact_unit = power_of_two(tl.load(exponents + 2 * b) + tl.load(exponents + 2 * b + 1) - 44)
    unit = exact_unit.to(tl.float32)
    total = tl.load(totals + row)
    inverse = 1 / total
    if too_coarse(tl.load(exponents_x + 2 * b + 1), variance, total.to(tl.float64)):
        products_of_differences(
            along, exact_unit, field + b * f_b + n * f_n, f_d, refs + b * r_b, r_m, r_d, h, M, D
        )  # fmt: skip
        tl.debug_barrier()
    top = tl.load(along + h)
    g = tl.full([], 1.0, tl.float32)
    if GIVEN:
        g = tl.load(g_log_density + b * g_b + n * g_n).to(tl.float32)
    if RESIDUAL:
        g = 2 * g
    mean_along = tl.zeros([], tl.float32)
    mean_logit = tl.zeros([], tl.float32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * M + j, mask=j < M, other=float("-inf"))
        w = tl.exp2(logit) * inverse
        mean_along += tl.sum(w * ((tl.load(along + j, mask=j < M, other=0) - top).to(tl.float32) * unit), 0)
        mean_logit += tl.sum(tl.where(w > 0, w * logit, 0.0), 0)
    size = tl.abs(g)
    of_variance = tl.zeros([], tl.float32)
    log_weights += b * l_b
    log_h = tl.zeros([], tl.float32)
    if LOGS:
        log_h = tl.load(log_weights + h * l_m).to(tl.float32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * M + j, mask=j < M, other=float("-inf"))
        w = tl.exp2(logit) * inverse
        v = (tl.load(along + j, mask=j < M, other=0) - top).to(tl.float32) * unit - mean_along
        if RESIDUAL:
            v += g * LN_2 * (logit - mean_logit)
        c = tl.where(w > 0, w * (v + g), w)
        tl.store(coefficients + row * M + j, c, mask=j < M)
        size = tl.maximum(size, tl.max(tl.where(j < M, tl.abs(c), 0.0), 0))
        if not RESIDUAL:
            if LOGS:  # what is left is of the squared distance
                logit -= LOG2_E * (tl.load(log_weights + j * l_m, mask=j < M, other=0.0).to(tl.float32) - log_h)
            of_variance += tl.sum(tl.where(w > 0, c * logit, 0.0), 0)
    tl.debug_barrier()
    # The sum of all coefficients but that of h is at most twice the largest.
    e = tl.minimum(tl.maximum(exponent_above(size) + 1, -90), 120)
    scale = power_of_two_single(30 - e)
    inverse_variance = (1 / variance).to(tl.float32)
    used = tl.zeros([], tl.int32)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        c = tl.load(coefficients + row * M + j, mask=j < M, other=0.0)
        word = tl.where((j != h) & is_finite(c), nearest_word(c * scale), 0)
        used += tl.sum(word, 0)
        tl.store(words + row * width + j, digits(word), mask=(j < width) & (j != h))
        if not RESIDUAL:
            tl.store(coefficients + row * M + j, c * inverse_variance, mask=j < M)
    tl.store(words + row * width + h, digits(-used))
    # NaN of a point or field is passed on in float32.
    valid = tl.load(valid_field + row) + mean_along * 0 + g * 0
    tl.store(scales + row, power_of_two(e) * (1 + valid))
    if not RESIDUAL:
        tl.store(sizes + row, size * inverse_variance)
        distance = tl.load(least + row) / variance
        total = 0.5 * (g * (distance - dimensions) - 2 * LN_2 * of_variance) / variance
        tl.store(g_sigma2 + row, rounded(total + valid, g_sigma2.dtype.element_ty))


@triton.jit
def words_kernel(coefficients, sizes, heaviest, words, exponents, M, N, width, BLOCK: tl.constexpr):
    """Coefficients `[B, N, M]` of one query as words `[B, N, width]`, in one scale per group, whose `exponents` these
    are; zero for the heaviest reference point."""
    row = tl.program_id(0).to(tl.int64)
    b = row // N
    size = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        each = tl.load(sizes + b * N + n, mask=n < N, other=0.0)
        size = tl.maximum(size, tl.where(is_finite(each), each, 0.0))
    e = tl.minimum(tl.maximum(exponent_above(tl.max(size, 0)), -90), 120)
    scale = power_of_two_single(30 - e)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        c = tl.load(coefficients + row * M + j, mask=j < M, other=0.0)
        word = tl.where(is_finite(c) & (j != tl.load(heaviest + row)), nearest_word(c * scale), 0)
        tl.store(words + row * width + j, digits(word), mask=j < width)
    if row % N == 0:
        tl.store(exponents + b, e)


@triton.jit
def sum_of_differences(coefficients, c_stride, points, p_n, p_d, count, base, d, D, LOGITS: tl.constexpr):
    """Σ_n c_n (point_n - base) in float64, over `count` points; with LOGITS, of the weights 2^c."""
    total = tl.zeros(base.shape, tl.float64)
    for start in range(0, count, 4):
        n = start + tl.arange(0, 4)
        c = tl.load(coefficients + n.to(tl.int64) * c_stride, mask=n < count, other=0.0)
        if LOGITS:
            c = tl.where(n < count, tl.exp2(c), 0.0)
        difference = load_tile(points, n, p_n, count, d, p_d, D) - base[None, :]
        total += tl.sum(c.to(tl.float64)[:, None] * difference, 0)
    return total


@triton.jit
def kde_results_kernel(
    sums, exponents, logits, scales, totals, heaviest, x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    shift, mean,
    N, M, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """m - x and m of one query from its sums Σ_j c_j r_j, with coefficients relative to the heaviest point."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    h = tl.load(heaviest + row).to(tl.int64)
    refs += b * r_b
    e = tl.load(exponents + 2 * b + 1)
    unit = power_of_two(e - 44) * tl.load(scales + row)
    total = tl.load(totals + row).to(tl.float64)
    coarse = too_coarse(e, tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64), total)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = row * D + d
        ref = load_row(refs + h * r_m, d, r_d, D)
        beyond = tl.load(sums + at, mask=d < D, other=0).to(tl.float64) * unit + total * 0
        if coarse:
            beyond = sum_of_differences(logits + row * M, 1, refs, r_m, r_d, M, ref, d, D, True) / total
        point = load_row(x + b * x_b + n * x_n, d, x_d, D)
        tl.store(shift + at, rounded((ref - point) + beyond, shift.dtype.element_ty), mask=d < D)
        tl.store(mean + at, rounded(ref + beyond, mean.dtype.element_ty), mask=d < D)


@triton.jit
def derivative_results_kernel(
    sums, exponents, coefficients, totals, scales, heaviest,
    x, x_b, x_n, x_d, field, f_b, f_n, f_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n, g_log_density, g_b, g_n,
    out,
    N, M, D,
    RESIDUAL: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(Σ_j c_j r_j + g (r_h - x))/σ² - field of one query; with RESIDUAL, g is doubled, and the whole is divided by
    σ². Unless GIVEN, g is 1."""
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    h = tl.load(heaviest + row).to(tl.int64)
    variance = tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64)
    refs += b * r_b
    e = tl.load(exponents + 2 * b + 1)
    unit = power_of_two(e - 44) * tl.load(scales + row)
    total_weight = tl.load(totals + row).to(tl.float64)
    coarse = too_coarse(e, variance, total_weight)
    g = tl.full([], 1.0, tl.float64)
    if GIVEN:
        g = tl.load(g_log_density + b * g_b + n * g_n).to(tl.float64)
    if RESIDUAL:
        g = 2 * g
    g += total_weight * 0
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = row * D + d
        ref = load_row(refs + h * r_m, d, r_d, D)
        total = tl.load(sums + at, mask=d < D, other=0).to(tl.float64) * unit
        if coarse:
            total = sum_of_differences(coefficients + row * M, 1, refs, r_m, r_d, M, ref, d, D, False)
            if not RESIDUAL:  # they are divided by σ² already
                total *= variance
        total += g * (ref - load_row(x + b * x_b + n * x_n, d, x_d, D))
        along = load_row(field + b * f_b + n * f_n, d, f_d, D)
        if RESIDUAL:
            total = (total / variance - along) / variance
        else:
            total = total / variance - along
        tl.store(out + at, rounded(total, out.dtype.element_ty), mask=d < D)


@triton.jit
def gathered_results_kernel(
    sums, exponents, totals, valid, of_points, of_coefficients, words, coefficients, heaviest, exponents_x,
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    out,
    N, M, V, width,
    VALUES: tl.constexpr, PULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add Σ_n w_nj values_n (VALUES) and Σ_n c_nj (x_n - r_j) (PULL) of one reference point j to `out` (float64).

    `sums` and `of_points` are the sums of products of `values` and of x; `of_coefficients` the exponent of c.
    """
    row = tl.program_id(0).to(tl.int64)
    b, j = row // M, row % M
    invalid = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.int64)
    coarse = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        invalid += tl.load(totals + b * N + n, mask=n < N, other=0.0) * 0
        invalid += tl.load(valid + b * N + n, mask=n < N, other=0.0)
        if PULL:
            word = tl.load(words + (b * N + n) * width + j, mask=n < N, other=0)
            total += word_of(word).to(tl.int64)
            weight = tl.load(totals + b * N + n, mask=n < N, other=1.0).to(tl.float64)
            variance = tl.load(sigma2 + b * s_b + n * s_n, mask=n < N, other=1.0).to(tl.float64)
            coarse += tl.sum(too_coarse(tl.load(exponents_x + 2 * b), variance, weight).to(tl.int32), 0)
    nothing = tl.sum(invalid, 0).to(tl.float64)
    unit = power_of_two(tl.load(exponents + 2 * b) - 44)
    for start in range(0, V, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = row * V + d
        value = tl.zeros([BLOCK], tl.float64) + nothing
        if VALUES:
            value += tl.load(sums + at, mask=d < V, other=0).to(tl.float64) * unit
        if PULL:
            e = tl.load(of_coefficients + b)
            unit_x = power_of_two(e + tl.load(exponents_x + 2 * b) - 44)
            pulled = tl.load(of_points + at, mask=d < V, other=0).to(tl.float64) * unit_x
            ref = load_row(refs + b * r_b + j * r_m, d, r_d, V)
            pulled -= (ref - load_row(refs + b * r_b, d, r_d, V)) * (
                tl.sum(total, 0).to(tl.float64) * power_of_two(e - 30)
            )
            of_group = coefficients + b * N * M + j
            if coarse > 0:
                pulled = sum_of_differences(of_group, M, x + b * x_b, x_n, x_d, N, ref, d, V, False)
            else:  # queries whose heaviest point this is have no words for it
                for first in range(0, N, 16):
                    n = first + tl.arange(0, 16)
                    mine = tl.load(heaviest + b * N + n, mask=n < N, other=-1) == j
                    if tl.max(mine.to(tl.int32), 0) > 0:
                        c = tl.load(of_group + n.to(tl.int64) * M, mask=mine, other=0.0).to(tl.float64)
                        point = load_tile(x + b * x_b, n, x_n, N, d, x_d, V)
                        pulled += tl.sum(c[:, None] * (point - ref[None, :]), 0)
            value += pulled
        tl.store(out + at, tl.load(out + at, mask=d < V, other=0.0) + value, mask=d < V)
