"""Weights of reference points under a kernel from inner products, and the coefficients of derivatives of averages."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.gram.kde import store_distances
from fluxkernels.triton_kernels.scalars import rounded

# Cost of a reference point that has no weight, and of a pair that is left out or does not exist.
ABSENT, LEFT_OUT = tl.constexpr(1e300), tl.constexpr(1e308)


@triton.jit
def costs_of_row(
    distances, log_weights, l_m, variance, s_m, own, j, M,
    LOGS: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
):  # fmt: skip
    """Minus the logits of reference points j, in nats."""
    a = tl.load(distances + j, mask=j < M, other=0.0)
    of_ref = tl.load(variance + j * s_m, mask=j < M, other=1.0).to(tl.float64)
    if LAPLACE:
        cost = tl.sqrt(a / of_ref)
    else:
        cost = 0.5 * a / of_ref
    if LOGS:
        log = tl.load(log_weights + j * l_m, mask=j < M, other=0.0).to(tl.float64)
        cost = tl.where(log == float("-inf"), ABSENT, cost - log)
    if EXCLUDE:
        cost = tl.where(j == own, LEFT_OUT, cost)
    return tl.where(j < M, cost, LEFT_OUT)


@triton.jit
def kernel_average_weights_kernel(
    products, splits,
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n, s_m, log_weights, l_b, l_m,
    weights, distances, log_sum, of_none,
    N, M, D, first,
    LOGS: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weights of the reference points for one query, their squared distances, both `[B, N, M]`, and the log-sum.

    The query is number `first` + n of its group. If it has no reference point, all weights are `of_none`.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    products += b * splits * (N + 1) * (tl.zeros([], tl.int64) + M + 1)
    refs += b * r_b
    distances += row * M
    weights += row * M
    store_distances(
        distances, products, splits, n, x + b * x_b + n * x_n, x_d, refs, r_m, r_d, refs, r_m, r_d, 0.0,
        N, M, D, False, BLOCK, DEPTH,
    )  # fmt: skip
    variance, log_weights = sigma2 + b * s_b + n * s_n, log_weights + b * l_b
    least = tl.full([], LEFT_OUT, tl.float64)
    total = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        cost = costs_of_row(
            distances, log_weights, l_m, variance, s_m, first + n, j, M, LOGS, EXCLUDE, LAPLACE
        )  # fmt: skip
        lower = tl.minimum(least, tl.min(cost, 0))
        relative = tl.where(j < M, tl.exp(lower - cost), 0.0)
        total = total * tl.exp(lower - least) + tl.sum(relative, 0)
        least = lower
    none = least > 0.5 * ABSENT
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        cost = costs_of_row(
            distances, log_weights, l_m, variance, s_m, first + n, j, M, LOGS, EXCLUDE, LAPLACE
        )  # fmt: skip
        w = tl.where(none, of_none, tl.exp(least - cost) / total)
        tl.store(weights + j, w, mask=j < M)
    result = tl.where(none, float("-inf"), tl.log(total) - least)
    tl.store(log_sum + row, rounded(result, log_sum.dtype.element_ty))


@triton.jit
def kernel_average_moments_kernel(
    weights, distances, along, sigma2, s_b, s_n, s_m, log_sum, g_log_sum, g_b, g_n,
    cotangents, coefficients, of_point, slopes,
    N, M,
    LAPLACE: tl.constexpr, PER_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cotangents of the logits of one query, and coefficients of the reference points in the cotangent of z.

    V_j are the products `along` of the cotangent of the average with the values, and V̄ is their mean under w. The
    cotangent of logit j is c_j = w_j (V_j - V̄ + g). Its coefficient is c_j/σ², or with LAPLACE c_j/σ|x - r_j|, and that
    of the query, `of_point`, is minus the sum of all as computed. `slopes` are the cotangents of σ²; with PER_REF,
    those of each pair, which go to `along`.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    sigma2 += b * s_b + n * s_n
    has_none = tl.load(log_sum + row) == float("-inf")
    g = tl.where(has_none, 0.0, tl.load(g_log_sum + b * g_b + n * g_n).to(tl.float64))
    mean_along = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(weights + row * M + at, mask=at < M, other=0.0)
        mean_along += tl.sum(w * tl.load(along + row * M + at, mask=at < M, other=0.0), 0)
    all_others = tl.zeros([], tl.float64)
    of_variance = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        w = tl.load(weights + row * M + j, mask=j < M, other=0.0)
        a = tl.load(distances + row * M + j, mask=j < M, other=0.0)
        variance = tl.load(sigma2 + j * s_m, mask=j < M, other=1.0).to(tl.float64)
        c = tl.where(w == 0, 0.0, w * (tl.load(along + row * M + j, mask=j < M, other=0.0) - mean_along + g))
        if LAPLACE:
            e = tl.where(a > 0, c / tl.sqrt(tl.where(a > 0, a, 1.0) * variance), 0.0)
        else:
            e = c / variance
        slope = 0.5 * e * a / variance
        tl.store(cotangents + row * M + j, c, mask=j < M)
        tl.store(coefficients + row * M + j, e, mask=j < M)
        if PER_REF:
            tl.store(along + row * M + j, slope, mask=j < M)
        all_others += tl.sum(e, 0)
        of_variance += tl.sum(slope, 0)
    tl.store(of_point + row, -all_others)
    if not PER_REF:
        tl.store(slopes + row, of_variance.to(slopes.dtype.element_ty))
