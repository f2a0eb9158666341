"""Transition weights (Eq. 52) and the average they define (Eq. 9), in few dimensions.

Reference points are the means μ_i = x0_i + (1-e^{-τ})(m(x0_i) - x0_i), queries are the ends of the chains.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E, one_minus_exp
from fluxkernels.triton_kernels.streaming.tiles import (
    load_points,
    load_tile,
    moved_displacement,
    over_lanes,
    place,
    store_points,
    sweep,
    weight,
    zeros,
)


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
def store_weight(weights, y, scale, nearest, inverse, points, moves, pull, k, exists, D: tl.constexpr):
    """Store the weight of start k."""
    _, a = moved_displacement(y, points, moves, pull, k, D)
    w = weight(a, nearest, scale) * inverse
    tl.store(weights, w.to(weights.dtype.element_ty), mask=exists)


@triton.jit
def transition_weights_kernel(
    x0, x_b, shift0, h_b, xt, t_b, t_n, t_d, sigma2, s_b, tau, a_b,
    weights,
    N, E,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Weights `[B, N, E]` of all starts for one block of ends of one group."""
    b, j, inside, lane = place(E, COLUMNS, LANES)
    y = load_points(xt + b * t_b, j * t_n, t_d, inside, D, ACC)
    pull, scale = pull_and_scale(sigma2 + b * s_b, tau + b * a_b, ACC)
    scale = tl.zeros([COLUMNS * LANES], ACC) + scale
    starts, moved = x0 + b * x_b, shift0 + b * h_b
    nearest, total, _none = sweep(y, lane, scale, starts, moved, pull, N, D, ROWS, LANES, False, True)
    inverse = 1 / total
    at, at_move = starts + lane * (ROWS * D), moved + lane * (ROWS * D)
    out = weights + b * N * E + j
    stride = tl.zeros([], tl.int64) + E
    at_weight = out + lane * ROWS * stride
    whole = N // (ROWS * LANES)
    for _ in range(whole):
        points, moves = load_tile(at, ROWS * D, ACC), load_tile(at_move, ROWS * D, ACC)
        at += ROWS * LANES * D
        at_move += ROWS * LANES * D
        for k in tl.static_range(ROWS):
            store_weight(at_weight + k * stride, y, scale, nearest, inverse, points, moves, pull, k, inside, D)
        at_weight += ROWS * LANES * stride
    for start in range(whole * (ROWS * LANES), N, LANES):
        i = (start + lane).to(tl.int64)
        exists = inside & (i < N)
        points, moves = load_points(starts, i * D, 1, exists, D, ACC), load_points(moved, i * D, 1, exists, D, ACC)
        store_weight(out + i * stride, y, scale, nearest, inverse, points, moves, pull, 0, exists, D)


@triton.jit
def transition_ends_kernel(
    x0, x_b, shift0, h_b, xt, t_b, t_n, t_d, values, v_b, v_n, v_d, sigma2, s_b, tau, a_b,
    packed, p_b, c_b,
    N, E, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Per end and COUNT columns of the values, the WIDTH adjacent numbers that `transition_average_kernel` reads: the
    end, its least squared distance from a start, and the values over the total of the weights."""
    b, j, inside, lane = place(E, COLUMNS, LANES)
    y = load_points(xt + b * t_b, j * t_n, t_d, inside, D, ACC)
    pull, scale = pull_and_scale(sigma2 + b * s_b, tau + b * a_b, ACC)
    scale = tl.zeros([COLUMNS * LANES], ACC) + scale
    nearest, total, _none = sweep(y, lane, scale, x0 + b * x_b, shift0 + b * h_b, pull, N, D, ROWS, LANES, False, True)
    inverse = 1 / total
    written = inside & (lane == 0)
    row = packed + b * p_b + j * WIDTH
    for first in range(0, V, COUNT):
        store_points(row, 0, 1, y + (nearest,), written, D + 1)
        for u in tl.static_range(COUNT):
            column = tl.zeros_like(j) + first + u
            value = tl.load(values + b * v_b + j * v_n + column * v_d, mask=written & (column < V), other=0.0).to(ACC)
            tl.store(row + D + 1 + u, value * inverse, mask=written)
        row += c_b


@triton.jit
def add_values(result, point, shift, pull, scale, ends, k, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the values of end k of a tuple of packed numbers, times their weight: nothing if all of them are zero."""
    a = 0.0
    for d in tl.static_range(D):
        difference = tl.fma(pull, shift[d], point[d] - ends[k * WIDTH + d])  # as in `moved_displacement`
        a = difference * difference if d == 0 else tl.fma(difference, difference, a)
    w = weight(a, ends[k * WIDTH + D], scale)
    summed = ()
    for u in tl.static_range(COUNT):
        summed = summed + (result[u] + w * ends[k * WIDTH + D + 1 + u],)
    return summed


@triton.jit
def transition_average_kernel(
    x0, x_b, shift0, h_b, sigma2, s_b, tau, a_b,
    packed, p_b, c_b, average,
    N, E, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij values_j for COUNT columns of the values: ends stream past the starts."""
    b, i, inside, lane = place(N, COLUMNS, LANES)
    chunk = tl.program_id(1)
    pull, scale = pull_and_scale(sigma2 + b * s_b, tau + b * a_b, ACC)
    point = load_points(x0 + b * x_b, i * D, 1, inside, D, ACC)
    shift = load_points(shift0 + b * h_b, i * D, 1, inside, D, ACC)
    result = zeros(point[0], COUNT)
    base = packed + b * p_b + chunk * c_b
    at = base + lane * (ROWS * WIDTH)
    whole = E // (ROWS * LANES)
    for _ in range(whole):
        ends = load_tile(at, ROWS * WIDTH, ACC)
        at += ROWS * LANES * WIDTH
        for k in tl.static_range(ROWS):
            result = add_values(result, point, shift, pull, scale, ends, k, D, COUNT, WIDTH)
    for start in range(whole * (ROWS * LANES), E, LANES):
        exists = start + lane < E
        ends = load_points(base, (start + lane).to(tl.int64) * WIDTH, 1, exists, WIDTH, ACC)
        result = add_values(result, point, shift, pull, scale, ends, 0, D, COUNT, WIDTH)
    for u in tl.static_range(COUNT):
        column = tl.zeros_like(i) + chunk * COUNT + u
        value = over_lanes(result[u], LANES).to(average.dtype.element_ty)
        tl.store(average + (b * N + i) * V + column, value, mask=inside & (lane == 0) & (column < V))
