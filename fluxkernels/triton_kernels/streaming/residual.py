"""The closed-form part of the residual's gradient, in few dimensions."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E
from fluxkernels.triton_kernels.streaming.tiles import (
    NO_LOGIT,
    displacement,
    load_points,
    load_tile,
    over_lanes,
    place,
    store_points,
    sweep,
    zeros,
)


@triton.jit
def add_moment(moment, x, f, scale, slope, nearest, step, points, k, inside, D: tl.constexpr):
    """Add w_k e_k [e_k·f - c (a_k - least)/σ²] of reference point k, the weight relative to that of the nearest."""
    e, a = displacement(x, points, k, D)
    logit = tl.where(inside, (nearest - a) * scale, NO_LOGIT)
    centered = ()
    along = logit * slope
    for d in tl.static_range(D):
        centered = centered + (e[d] - step[d],)
        along += centered[d] * f[d]
    c = tl.exp2(logit) * along
    summed = ()
    for d in tl.static_range(D):
        summed = summed + (moment[d] + c * centered[d],)
    return summed


@triton.jit
def residual_kernel(
    z, z_b, z_n, z_d, field, f_b, f_n, f_d, refs, r_b, sigma2, s_b, s_n,
    factors, c_b, c_n,
    gradient,
    N, M,
    FACTOR: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Σ_j w_j e_j [e_j·f - c a_j/σ²]/σ⁴ - f/σ² + 2c (m - z)/σ⁴ with e_j = r_j - m: moments about m, which a first
    sweep computes. Because Σ_j w_j e_j = 0, the least a_j may be subtracted from each, which keeps its digits. Without
    FACTOR c is 1."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    f = load_points(field + b * f_b, n * f_n, f_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    factor = tl.full([], 1.0, ACC)
    if FACTOR:
        factor = tl.load(factors + b * c_b + n * c_n, mask=inside, other=1.0).to(ACC)
    slope = factor / HALF_LOG2_E
    base = refs + b * r_b
    nearest, total, step = sweep(x, lane, scale, base, base, 0.0, M, D, ROWS, LANES, True, False)
    moment = zeros(x[0], D)
    at = base + lane * (ROWS * D)
    whole = M // (ROWS * LANES)
    for _ in range(whole):
        points = load_tile(at, ROWS * D, ACC)
        at += ROWS * LANES * D
        for k in tl.static_range(ROWS):
            moment = add_moment(moment, x, f, scale, slope, nearest, step, points, k, True, D)
    for start in range(whole * (ROWS * LANES), M, LANES):
        exists = start + lane < M
        points = load_points(base, (start + lane).to(tl.int64) * D, 1, exists, D, ACC)
        moment = add_moment(moment, x, f, scale, slope, nearest, step, points, 0, exists, D)
    result = ()
    for d in tl.static_range(D):
        of_points = over_lanes(moment[d], LANES) / total
        result = result + (((of_points + 2 * factor * step[d]) / variance - f[d]) / variance,)
    store_points(gradient, (b * N + n) * D, 1, result, inside & (lane == 0), D)
