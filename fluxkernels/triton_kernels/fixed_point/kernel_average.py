"""Weights of reference points under a kernel from exact inner products, and averages of values.

With u_j = T_j - H_j in units of products, |x - r_j|² is |x - r_p|² + 2 (u_p - u_j) for the nearest reference point p.
Logits are relative to that of a reference point h, the heaviest up to rounding, as sums of differences: each of log
weights, squared distances and scales loses no digits where its terms are nearly equal.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: C901, PLR0912, PLR0913, PLR0915
import triton
import triton.language as tl

from fluxkernels.triton_kernels.differences import load_row, squared_distances
from fluxkernels.triton_kernels.fixed_point.kde import LOG2_E, TOLERANCE, squares_to, store_weight_words
from fluxkernels.triton_kernels.fixed_point.numbers import LOWEST, power_of_two
from fluxkernels.triton_kernels.scalars import rounded

# Logit in powers of two below which a weight is not in the digits of a result.
NEGLIGIBLE = tl.constexpr(-25.0)
# Rounding of a logit in float32 relative to its terms; a tenth counts, since it differs from point to point.
ROUNDING = tl.constexpr(1.5e-8)


@triton.jit
def scale_of(variance, LAPLACE: tl.constexpr):
    """Nats per squared distance, 1/2σ², or with LAPLACE per distance, 1/σ."""
    return 1 / tl.sqrt(variance) if LAPLACE else 0.5 / variance


@triton.jit
def exact_difference(a, b):
    """a - b as the sum of two float32."""
    high = a - b
    of_b = high - a
    return high, (a - (high - of_b)) - (b + of_b)


@triton.jit
def log_weights_of(log_weights, l_m, j, own, M, LOGS: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr):
    """Log weights of reference points j for some queries, or one row for all; -inf for a pair that does not count."""
    log = tl.zeros(j.shape, ACC)
    if LOGS:
        log = tl.load(log_weights + j * l_m, mask=j < M, other=0.0).to(ACC)
    log = tl.where(j < M, log, float("-inf"))[None, :]
    if EXCLUDE:
        log = tl.where(j[None, :] == own[:, None], float("-inf"), log)
    return log


@triton.jit
def kernel_average_weights_kernel(
    products, halves, exponents, valid_queries,
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n, s_m, of_refs, log_weights, l_b, l_m,
    logits, words, scales, totals, heaviest, least, variances, log_sum, sensitive,
    of_none, N, M, D, width, first,
    LOGS: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr, PER_REF: tl.constexpr, RELATIVE: tl.constexpr,
    REPAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weights of the reference points for ROWS queries, the first of which is number `first` + n of its group.

    Results are those of `weights_kernel` relative to reference point h, its variance in `variances`, and log-sums. A
    query without reference points has no weights and a total of `of_none`. With PER_REF, `of_refs` `[B, 2, M]` are the
    scales of the reference points as sums of two float32.
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
    own = first + n
    products += row[:, None] * M
    logits += row[:, None] * M
    halves += b * M
    x += b * x_b
    refs += b * r_b
    log_weights += b * l_b
    of_refs += 2 * b * M
    sigma2 += b * s_b
    valid = tl.load(valid_queries + row)
    e_x, e_refs = tl.load(exponents + 2 * b), tl.load(exponents + 2 * b + 1)
    per_unit = power_of_two(e_x + e_refs - 43)  # squared distance
    single_unit = per_unit.to(tl.float32)

    # Reference point h.
    h = tl.zeros([ROWS], tl.int32)
    if REPAIR:
        lowest = tl.full([ROWS], float("inf"), tl.float64)
        for start in range(0, M, 64):
            j = start + tl.arange(0, 64)
            point = x + tl.sum(n, 0) * x_n
            a = squared_distances(point, x_d, refs, r_m, r_d, refs, r_m, r_d, 0.0, j, M, D, False, DEPTH)
            at = sigma2 + tl.sum(n, 0) * s_n + j * s_m
            scale = scale_of(tl.load(at, mask=j < M, other=1.0).to(tl.float64), LAPLACE)
            t = tl.sqrt(a) if LAPLACE else a
            cost = (t * scale)[None, :] - log_weights_of(log_weights, l_m, j, own, M, LOGS, EXCLUDE, tl.float64)
            tl.store(products + j[None, :], cost.to(tl.int64, bitcast=True), mask=(j < M)[None, :])
            lower = tl.min(cost, 1)
            at_lower = tl.min(tl.where(cost == lower[:, None], j[None, :], 2**31 - 1), 1)
            h = tl.where(lower < lowest, at_lower, h)
            lowest = tl.minimum(lowest, lower)
        none = lowest == float("inf")
        tl.debug_barrier()
    else:
        top = tl.full([ROWS], LOWEST, tl.int64)
        p = tl.zeros([ROWS], tl.int32)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            half = tl.load(halves + j, mask=j < M, other=0)
            u = tl.load(products + j[None, :], mask=(j < M)[None, :], other=0) - half[None, :]
            u = tl.where((j < M)[None, :], u, LOWEST)
            higher = tl.max(u, 1)
            if LAPLACE or PER_REF:
                at_higher = tl.min(tl.where(u == higher[:, None], j[None, :], 2**31 - 1), 1)
                p = tl.where(higher > top, at_higher, p)
            top = tl.maximum(top, higher)
        nearest = tl.zeros([ROWS, 1], tl.float32)
        if LAPLACE or PER_REF:
            nearest = squares_to(
                x, n, x_n, x_d, refs, r_m, r_d, refs, r_m, r_d, 0.0, p, N, M, D, False, ROWS, DEPTH
            ).to(tl.float32)[:, None]  # fmt: skip
        scale = tl.zeros([ROWS, 1], tl.float32)
        if not PER_REF:
            scale = scale_of(tl.load(sigma2 + n * s_n).to(tl.float64), LAPLACE).to(tl.float32)[:, None]
        best = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            half = tl.load(halves + j, mask=j < M, other=0)
            u = tl.load(products + j[None, :], mask=(j < M)[None, :], other=0) - half[None, :]
            of_pair = tl.load(of_refs + j, mask=j < M, other=0.0)[None, :] if PER_REF else scale
            t = nearest + (top[:, None] - u).to(tl.float32) * single_unit
            if LAPLACE:
                t = tl.sqrt(t)
            log = log_weights_of(log_weights, l_m, j, own, M, LOGS, EXCLUDE, tl.float32)
            logit = tl.where(log > float("-inf"), log - t * of_pair, float("-inf"))
            higher = tl.max(logit, 1)
            at_higher = tl.min(tl.where(logit == higher[:, None], j[None, :], 2**31 - 1), 1)
            h = tl.where(higher > best, at_higher, h)
            best = tl.maximum(best, higher)
        none = best == float("-inf")

    h = tl.minimum(h, M - 1)  # of NaN
    square = squares_to(
        x, n, x_n, x_d, refs, r_m, r_d, refs, r_m, r_d, 0.0, h, N, M, D, False, ROWS, DEPTH
    )  # fmt: skip
    variance = tl.load(sigma2 + n * s_n + h * s_m).to(tl.float64)
    valid += (variance * 0).to(tl.float32)
    exact_scale = scale_of(variance, LAPLACE)
    t_h = tl.sqrt(square) if LAPLACE else square
    log_h = tl.zeros([ROWS], tl.float64)
    if LOGS:
        log_h = tl.load(log_weights + h * l_m).to(tl.float64)
    at_h = log_h - t_h * exact_scale

    # Logits relative to that of h, and what their errors depend on.
    scale_h = exact_scale.to(tl.float32)[:, None]
    unit = exact_scale * per_unit
    high_unit = tl.minimum(unit, 1e38).to(tl.float32)[:, None]
    low_unit = (unit - high_unit.reshape(ROWS).to(tl.float64)).to(tl.float32)[:, None]
    t_single, log_single = t_h.to(tl.float32)[:, None], log_h.to(tl.float32)[:, None]
    steepest = exact_scale.to(tl.float32)
    shortest = t_h.to(tl.float32)
    others, reach, terms = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if not REPAIR:
        u_h = tl.load(products + h[:, None]) - tl.load(halves + h)[:, None]
        if PER_REF:
            high_h, low_h = tl.load(of_refs + h)[:, None], tl.load(of_refs + M + h)[:, None]
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = (j < M)[None, :]
        half = tl.load(halves + j, mask=j < M, other=0)
        valid += tl.sum(tl.where(half == -LOWEST, float("nan"), 0.0), 0)
        if REPAIR:
            cost = tl.load(products + j[None, :], mask=inside, other=0).to(tl.float64, bitcast=True)
            logit = (tl.minimum(lowest[:, None] - cost, 0.0) * LOG2_E).to(tl.float32)
            counts = inside & (cost < float("inf"))
        else:
            log = log_weights_of(log_weights, l_m, j, own, M, LOGS, EXCLUDE, tl.float32)
            counts = log != float("-inf")
            of_log, rest = exact_difference(tl.where(counts, log, 0.0), log_single)
            u = tl.load(products + j[None, :], mask=inside, other=0) - half[None, :]
            beyond = u - u_h
            nearer = beyond.to(tl.float32)
            if LAPLACE or PER_REF:
                t = nearest + (top[:, None] - u).to(tl.float32) * single_unit
                gain = nearer * single_unit
                if LAPLACE:
                    t = tl.sqrt(t)
                    both = t + t_single
                    gain = tl.where(both > 0, gain / tl.where(both > 0, both, 1.0), 0.0)
                change = tl.zeros([1, BLOCK], tl.float32)
                if PER_REF:
                    high, low = (
                        tl.load(of_refs + j, mask=j < M, other=0.0)[None, :],
                        tl.load(of_refs + M + j, mask=j < M, other=0.0)[None, :],
                    )
                    change = (high - high_h) + (low - low_h)
                logit = tl.fma(gain, scale_h, of_log) + (rest - t * change)
            else:
                # Fused by name: one rounding of the sum, which is small where a weight counts.
                logit = tl.fma(nearer, high_unit, of_log)
                if LOGS:
                    left = (beyond - nearer.to(tl.int64)).to(tl.float32)
                    logit += rest + nearer * low_unit + left * high_unit
            logit = tl.where(counts, logit * LOG2_E, float("-inf"))
            matters = counts & (logit > NEGLIGIBLE)
            reach = tl.maximum(reach, tl.max(tl.where(matters, -nearer, 0.0), 1))
            if LAPLACE or PER_REF:
                shortest = tl.minimum(shortest, tl.min(tl.where(matters, t, float("inf")), 1))
                size = tl.abs(gain * scale_h) + tl.abs(t * change)
                terms = tl.maximum(terms, tl.max(tl.where(matters, size, 0.0), 1))
            if PER_REF:
                steepest = tl.maximum(steepest, tl.max(tl.where(matters, high, 0.0), 1))
        logit = tl.where(counts, logit, float("-inf"))
        tl.store(logits + j[None, :], logit, mask=inside & known[:, None])
        others += tl.sum(tl.where(counts & (j[None, :] != h[:, None]), tl.exp2(logit), 0.0), 1)
    total = 1 + others

    tl.store(totals + row, tl.where(none, of_none, total + valid), mask=known)
    tl.store(heaviest + row, h, mask=known)
    tl.store(least + row, square, mask=known)
    tl.store(variances + row, variance, mask=known)
    result = tl.where(none, float("-inf"), tl.log((total + valid).to(tl.float64)) + at_h)
    tl.store(log_sum + row, rounded(result, log_sum.dtype.element_ty), mask=known)
    if not REPAIR:
        coordinates = 0.6 * (power_of_two(e_x - 30) + power_of_two(e_refs - 30))
        units = 44 * tl.sqrt(tl.zeros([], tl.float64) + D) * power_of_two(e_x + e_refs - 44)
        if LAPLACE:
            error = coordinates + units / tl.maximum(shortest.to(tl.float64), tl.sqrt(units))
        else:
            farthest = tl.sqrt(square + reach.to(tl.float64) * per_unit)
            error = 2 * (coordinates * farthest + units)
        error = error * steepest.to(tl.float64) + ROUNDING * terms.to(tl.float64)
        tl.store(sensitive + row, (error * (others / total) > TOLERANCE).to(tl.int32), mask=known)
    store_weight_words(
        logits, words + row[:, None] * width, scales, row, h, total, M, width, known, RELATIVE, ROWS, BLOCK
    )


@triton.jit
def kernel_average_results_kernel(
    sums, exponents, scales, totals, heaviest, values, v_b, v_m, v_d,
    average,
    N, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Average of the values for one query from its sums Σ_j c_j v_j, with coefficients relative to that of h."""
    row = tl.program_id(0).to(tl.int64)
    b = row // N
    h = tl.load(heaviest + row).to(tl.int64)
    unit = power_of_two(tl.load(exponents + 2 * b + 1) - 44) * tl.load(scales + row)
    nothing = tl.load(totals + row).to(tl.float64) * 0
    for start in range(0, V, BLOCK):
        d = start + tl.arange(0, BLOCK)
        beyond = tl.load(sums + row * V + d, mask=d < V, other=0).to(tl.float64) * unit + nothing
        value = load_row(values + b * v_b + h * v_m, d, v_d, V) + beyond
        tl.store(average + row * V + d, rounded(value, average.dtype.element_ty), mask=d < V)
