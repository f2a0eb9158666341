"""Weights of reference points from their inner products with the queries, and the coefficients of derivatives."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.differences import squared_distances
from fluxkernels.triton_kernels.scalars import normalized_log_density, one_minus_exp, rounded

# Fraction of |x|² + |r|² below which a distance is computed again, as the sum of squared differences.
CANCELED = tl.constexpr(1e-6)


@triton.jit
def store_distances(
    distances, products, splits, n, x, x_d, refs, r_m, r_d, move, m_m, m_d, pull,
    N, M, D,
    MOVED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store the squared distances |x_n - r_j|² of one query, from the products of its group."""
    width = tl.zeros([], tl.int64) + M + 1
    square = tl.zeros([], tl.float64)
    for s in range(splits):
        square += tl.load(products + (s * (N + 1) + n) * width + M)
    canceled = tl.zeros([], tl.int32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inner = tl.zeros([BLOCK], tl.float64)
        norms = tl.zeros([BLOCK], tl.float64) + square
        for s in range(splits):
            inner += tl.load(products + (s * (N + 1) + n) * width + j, mask=j < M, other=0.0)
            norms += tl.load(products + (s * (N + 1) + N) * width + j, mask=j < M, other=0.0)
        a = norms - 2 * inner
        near = (a < norms * CANCELED) & (j < M)
        canceled += tl.sum(near.to(tl.int32), 0)
        tl.store(distances + j, tl.where(near, -1.0, a), mask=j < M)
    tl.debug_barrier()
    if canceled > 0:
        for start in range(0, M, 16):
            j = (start + tl.arange(0, 16)).to(tl.int64)
            near = tl.load(distances + j, mask=j < M, other=0.0) < 0
            if tl.max(near.to(tl.int32), 0) > 0:
                a = squared_distances(x, x_d, refs, r_m, r_d, move, m_m, m_d, pull, j, M, D, MOVED, DEPTH)
                tl.store(distances + j, a, mask=near)
        tl.debug_barrier()


@triton.jit
def weights_kernel(
    products, splits,
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, move, m_b, m_m, m_d, sigma2, s_b, s_n, tau, a_b,
    weights, distances, log_density,
    N, M, D,
    MOVED: tl.constexpr, KDE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """w_j = softmax_j(-a_j/2σ²) of one query with a_j = |x - r_j|²; both `[B, N, M]`. With KDE, log p̂ too.

    With MOVED, reference points are the means of a transition, and the variance is σ²(1-e^{-2τ}), at least rounding:
    τ = 0 then gives the limit.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    width = tl.zeros([], tl.int64) + M + 1
    products += b * splits * (N + 1) * width
    x += b * x_b + n * x_n
    refs += b * r_b
    move += b * m_b
    variance = tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64)
    pull = variance
    if MOVED:
        t = tl.load(tau + b * a_b).to(tl.float64)
        pull = one_minus_exp(t)
        variance *= tl.maximum(one_minus_exp(2 * t), 4.930380657631324e-32)
    store_distances(
        distances + row * M, products, splits, n, x, x_d, refs, r_m, r_d, move, m_m, m_d, pull,
        N, M, D, MOVED, BLOCK, DEPTH,
    )  # fmt: skip
    least = tl.full([], float("inf"), tl.float64)
    total = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        a = tl.load(distances + row * M + j, mask=j < M, other=float("inf"))
        lower = tl.minimum(least, tl.min(a, 0))
        total = total * tl.exp(0.5 * (lower - least) / variance) + tl.sum(tl.exp(0.5 * (lower - a) / variance), 0)
        least = lower
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        a = tl.load(distances + row * M + j, mask=j < M, other=float("inf"))
        tl.store(weights + row * M + j, tl.exp(0.5 * (least - a) / variance) / total, mask=j < M)
    if KDE:
        log_p = normalized_log_density(total, least, variance, M, D)
        tl.store(log_density + row, rounded(log_p, log_density.dtype.element_ty))


@triton.jit
def moments_kernel(
    weights, distances, along, splits, sigma2, s_b, s_n, g_log_density, g_b, g_n,
    coefficients, of_point, of_field, g_sigma2,
    N, M, D,
    RESIDUAL: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Coefficients of the reference points, of the query and of the field in a derivative, for one query.

    V_j are the products `along` of a field with the reference points, and bars are means under w. The cotangent of the
    logit of reference point j is w_j (V_j - V̄ + g). With RESIDUAL, the coefficient is
    w_j (V_j - V̄ - g (a_j - ā)/σ² + 2g)/σ⁴, with a factor g, which is 1 unless GIVEN. That of the query is minus the
    sum of all others as computed, not its formula: the rounding of V̄ would be multiplied by the distance of the origin.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    width = tl.zeros([], tl.int64) + M + 1
    along += (b * splits * (N + 1) + n) * width
    variance = tl.load(sigma2 + b * s_b + n * s_n).to(tl.float64)
    g = tl.full([], 1.0, tl.float64)
    if GIVEN:
        g = tl.load(g_log_density + b * g_b + n * g_n).to(tl.float64)
    mean_along = tl.zeros([], tl.float64)
    mean_distance = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        w = tl.load(weights + row * M + j, mask=j < M, other=0.0)
        for s in range(splits):
            mean_along += tl.sum(w * tl.load(along + s * (N + 1) * width + j, mask=j < M, other=0.0), 0)
        mean_distance += tl.sum(w * tl.load(distances + row * M + j, mask=j < M, other=0.0), 0)
    of_variance = tl.zeros([], tl.float64)
    all_others = tl.zeros([], tl.float64)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        w = tl.load(weights + row * M + j, mask=j < M, other=0.0)
        a = tl.load(distances + row * M + j, mask=j < M, other=0.0)
        v = tl.zeros([BLOCK], tl.float64) - mean_along
        for s in range(splits):
            v += tl.load(along + s * (N + 1) * width + j, mask=j < M, other=0.0)
        if RESIDUAL:
            c = w * (v - g * (a - mean_distance) / variance + 2 * g) / (variance * variance)
        else:
            c = w * (v + g) / variance
            of_variance += tl.sum(c * a, 0)
        all_others += tl.sum(c, 0)
        tl.store(coefficients + row * M + j, c, mask=j < M)
    tl.store(of_point + row, -all_others)
    if RESIDUAL:
        tl.store(of_field + row, -1 / variance)
    else:
        tl.store(of_field + row, tl.full([], -1.0, tl.float64))
        of_variance = 0.5 * (of_variance - D * g) / variance
        tl.store(g_sigma2 + row, of_variance.to(g_sigma2.dtype.element_ty))
