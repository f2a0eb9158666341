"""Transition weights (Eq. 52) and the average they define (Eq. 9), in few dimensions.

Reference points are the means μ_i = x0_i + (1-e^{-τ})(m(x0_i) - x0_i), queries are the ends of the chains.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E, one_minus_exp
from fluxkernels.triton_kernels.streaming.tiles import differences, load_points, over_lanes, place, sweep, tile_rows


@triton.jit
def pull_and_scale(sigma2, tau, ACC: tl.constexpr):
    """(1-e^{-τ}, log₂e/2v) with v = σ²(1-e^{-2τ}), at least rounding: τ = 0 then gives the limit, where the nearest
    start has all the weight, instead of 0/0."""
    EPSILON: tl.constexpr = 2.220446049250313e-16 if ACC == tl.float64 else 1.1920928955078125e-07
    t = tl.load(tau).to(ACC)
    # At least 1e-37, whose inverse is finite.
    v = tl.maximum(tl.load(sigma2).to(ACC) * tl.maximum(one_minus_exp(2 * t), EPSILON * EPSILON), 1e-37)
    return one_minus_exp(t), HALF_LOG2_E / v


@triton.jit
def transition_ends_kernel(
    x0, x_b, x_n, x_d, shift0, h_b, h_n, h_d, xt, t_b, t_n, t_d, sigma2, s_b, tau, a_b,
    statistics, weights,
    N, E,
    D: tl.constexpr, ACC: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Statistics `[B, 2, E]`: per end, the least distance to a mean and the total of the weights. With WEIGHTS, the
    weights `[B, N, E]` instead."""
    b, j, inside, lane = place(E, COLUMNS, LANES)
    y = load_points(xt + b * t_b, j * t_n, t_d, inside, D, ACC)
    pull, scale = pull_and_scale(sigma2 + b * s_b, tau + b * a_b, ACC)
    scale = tl.zeros([COLUMNS * LANES], ACC) + scale
    starts, moves = x0 + b * x_b, shift0 + b * h_b
    least, total, _none = sweep(y, lane, scale, starts, x_n, x_d, moves, h_n, h_d, pull, N, D, ROWS, LANES, False, True)
    if WEIGHTS:
        for start in range(0, N, ROWS * LANES):
            i = tile_rows(start, lane, ROWS, LANES)
            _, a = differences(y, starts, moves, i * x_n, x_d, i * h_n, h_d, pull, i < N, D, True)
            w = tl.exp2((least[None, :] - a) * scale[None, :]) / total[None, :]
            at = (b * N + i) * E + j[None, :]
            tl.store(weights + at, w.to(weights.dtype.element_ty), mask=(i < N) & inside[None, :])
    else:
        tl.store(statistics + b * 2 * E + j, least, mask=inside & (lane == 0))
        tl.store(statistics + b * 2 * E + E + j, total, mask=inside & (lane == 0))


@triton.jit
def transition_average_kernel(
    x0, x_b, x_n, x_d, shift0, h_b, h_n, h_d, xt, t_b, t_n, t_d, values, v_b, v_n, v_d, sigma2, s_b, tau, a_b,
    statistics, average,
    N, E, V,
    D: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij values_j for WIDTH columns of the values: starts in columns, ends in rows."""
    b, i, inside, lane = place(N, COLUMNS, LANES)
    first = tl.program_id(1) * WIDTH
    pull, scale = pull_and_scale(sigma2 + b * s_b, tau + b * a_b, ACC)
    start_points = load_points(x0 + b * x_b, i * x_n, x_d, inside, D, ACC)
    move = load_points(shift0 + b * h_b, i * h_n, h_d, inside, D, ACC)
    result = ()
    for _ in tl.static_range(WIDTH):
        result = result + (tl.zeros([COLUMNS * LANES], ACC),)
    for start in range(0, E, ROWS * LANES):
        j = tile_rows(start, lane, ROWS, LANES)
        row = j < E
        least = tl.load(statistics + b * 2 * E + j, mask=row, other=0.0)
        total = tl.load(statistics + b * 2 * E + E + j, mask=row, other=1.0)
        a = tl.zeros([ROWS, COLUMNS * LANES], ACC)
        for d in tl.static_range(D):
            y = tl.load(xt + b * t_b + j * t_n + d * t_d, mask=row, other=0.0).to(ACC)
            difference = (start_points[d][None, :] - y) + (pull * move[d])[None, :]
            a += difference * difference
        w = tl.where(row, tl.exp2((least - a) * scale) / total, 0.0)
        summed = ()
        for u in tl.static_range(WIDTH):
            column = tl.zeros_like(j) + first + u
            value = tl.load(values + b * v_b + j * v_n + column * v_d, mask=row & (column < V), other=0.0)
            summed = summed + (result[u] + tl.sum(w * value.to(ACC), 0),)
        result = summed
    for u in tl.static_range(WIDTH):
        column = tl.zeros_like(i) + first + u
        at = (b * N + i) * V + column
        value = over_lanes(result[u], LANES).to(average.dtype.element_ty)
        tl.store(average + at, value, mask=inside & (lane == 0) & (column < V))
