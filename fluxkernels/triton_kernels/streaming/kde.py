"""Kernel density estimate in few dimensions: displacement to the weighted mean, log-density, and their derivatives."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E, normalized_log_density
from fluxkernels.triton_kernels.streaming.tiles import (
    displacement,
    load_points,
    load_tile,
    over_lanes,
    place,
    store_points,
    sweep,
    weight,
    zeros,
)


@triton.jit
def kde_kernel(
    z, z_b, z_n, z_d, refs, r_b, sigma2, s_b, s_n,
    shift, mean, log_density,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m - z, m and log p̂ of one block of queries of one group; results are contiguous."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    nearest, total, step = sweep(x, lane, scale, refs + b * r_b, refs, 0.0, M, D, ROWS, LANES, True, False)
    inside = inside & (lane == 0)
    at = (b * N + n) * D
    store_points(shift, at, 1, step, inside, D)
    centroid = ()
    for d in tl.static_range(D):
        centroid = centroid + (x[d] + step[d],)
    store_points(mean, at, 1, centroid, inside, D)
    log_p = normalized_log_density(total, nearest, variance, M, D)
    tl.store(log_density + b * N + n, log_p.to(log_density.dtype.element_ty), mask=inside)


@triton.jit
def logit_cotangent(e, step, v, g, D: tl.constexpr):
    """(r - m)·v + g: times a weight, the cotangent of the logit of a reference point."""
    along = g
    for d in tl.static_range(D):
        along += (e[d] - step[d]) * v[d]
    return along


@triton.jit
def add_query_cotangents(gradient, of_variance, x, scale, nearest, step, v, g, points, k, inside, D: tl.constexpr):
    """Add Σ_d c (r - x)_d and c |r - x|² of reference point k, where c is the cotangent of its logit."""
    e, a = displacement(x, points, k, D)
    w = tl.where(inside, weight(a, nearest, scale), 0.0)
    c = w * logit_cotangent(e, step, v, g, D)
    summed = ()
    for d in tl.static_range(D):
        summed = summed + (gradient[d] + c * e[d],)
    return summed, of_variance + c * a


@triton.jit
def kde_backward_queries_kernel(
    z, z_b, z_n, z_d, refs, r_b, sigma2, s_b, s_n,
    g_shift, gs_b, gs_n, gs_d, g_mean, gm_b, gm_n, gm_d, g_log_density, gl_b, gl_n,
    g_z, g_sigma2, packed, p_b,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and σ², and per query the WIDTH adjacent numbers that `kde_backward_refs_kernel` reads."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    base = refs + b * r_b
    nearest, total, step = sweep(x, lane, scale, base, base, 0.0, M, D, ROWS, LANES, True, False)
    of_shift = load_points(g_shift + b * gs_b, n * gs_n, gs_d, inside, D, ACC)
    of_mean = load_points(g_mean + b * gm_b, n * gm_n, gm_d, inside, D, ACC)
    g = tl.load(g_log_density + b * gl_b + n * gl_n, mask=inside, other=0.0).to(ACC)
    v = ()
    for d in tl.static_range(D):
        v = v + (of_shift[d] + of_mean[d],)
    gradient, of_variance = zeros(x[0], D), tl.zeros(x[0].shape, ACC)
    at = base + lane * (ROWS * D)
    whole = M // (ROWS * LANES)
    for _ in range(whole):
        points = load_tile(at, ROWS * D, ACC)
        at += ROWS * LANES * D
        for k in tl.static_range(ROWS):
            gradient, of_variance = add_query_cotangents(
                gradient, of_variance, x, scale, nearest, step, v, g, points, k, True, D
            )
    for start in range(whole * (ROWS * LANES), M, LANES):
        exists = start + lane < M
        points = load_points(base, (start + lane).to(tl.int64) * D, 1, exists, D, ACC)
        gradient, of_variance = add_query_cotangents(
            gradient, of_variance, x, scale, nearest, step, v, g, points, 0, exists, D
        )
    inverse = 1 / total
    written = inside & (lane == 0)
    result = ()
    scaled = ()
    for d in tl.static_range(D):
        result = result + (over_lanes(gradient[d], LANES) * inverse / variance - of_shift[d],)
        scaled = scaled + (v[d] * inverse,)
    store_points(g_z, (b * N + n) * D, 1, result, written, D)
    of_variance = 0.5 * (over_lanes(of_variance, LANES) * inverse / variance - D * g) / variance
    tl.store(g_sigma2 + b * N + n, of_variance.to(g_sigma2.dtype.element_ty), mask=written)
    row = b * p_b + n * WIDTH
    for_refs = x + step + scaled + (g * inverse, scale, nearest, 1 / variance)
    store_points(packed, row, 1, for_refs, written, 3 * D + 4)


@triton.jit
def add_ref_cotangents(gradient, r, query, k, D: tl.constexpr, WIDTH: tl.constexpr):
    """Add w v - c (r - z)/σ² of query k of a tuple of packed numbers, which adds nothing if all of them are zero."""
    x, step, v = (), (), ()
    for d in tl.static_range(D):
        x = x + (query[k * WIDTH + d],)
        step = step + (query[k * WIDTH + D + d],)
        v = v + (query[k * WIDTH + 2 * D + d],)
    g, scale, nearest, precision = (
        query[k * WIDTH + 3 * D],
        query[k * WIDTH + 3 * D + 1],
        query[k * WIDTH + 3 * D + 2],
        query[k * WIDTH + 3 * D + 3],
    )
    e = ()
    a = 0.0
    for d in tl.static_range(D):
        difference = r[d] - x[d]
        e = e + (difference,)
        a = difference * difference if d == 0 else tl.fma(difference, difference, a)
    w = weight(a, nearest, scale)
    c = logit_cotangent(e, step, v, g, D) * precision
    summed = ()
    for d in tl.static_range(D):
        summed = summed + (gradient[d] + w * (v[d] - c * e[d]),)
    return summed


@triton.jit
def kde_backward_refs_kernel(
    refs, r_b, packed, p_b,
    g_refs,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Cotangent of one block of reference points, a sum over queries, which stream past them."""
    b, j, inside, lane = place(M, COLUMNS, LANES)
    r = load_points(refs + b * r_b, j * D, 1, inside, D, ACC)
    gradient = zeros(r[0], D)
    base = packed + b * p_b
    at = base + lane * (ROWS * WIDTH)
    whole = N // (ROWS * LANES)
    for _ in range(whole):
        queries = load_tile(at, ROWS * WIDTH, ACC)
        at += ROWS * LANES * WIDTH
        for k in tl.static_range(ROWS):
            gradient = add_ref_cotangents(gradient, r, queries, k, D, WIDTH)
    for start in range(whole * (ROWS * LANES), N, LANES):
        exists = start + lane < N
        queries = load_points(base, (start + lane).to(tl.int64) * WIDTH, 1, exists, WIDTH, ACC)
        gradient = add_ref_cotangents(gradient, r, queries, 0, D, WIDTH)
    result = ()
    for d in tl.static_range(D):
        result = result + (over_lanes(gradient[d], LANES),)
    store_points(g_refs, (b * M + j) * D, 1, result, inside & (lane == 0), D)
