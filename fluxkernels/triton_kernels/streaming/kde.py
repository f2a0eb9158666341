"""Kernel density estimate in few dimensions: displacement to the weighted mean, log-density, and their derivatives."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E, normalized_log_density
from fluxkernels.triton_kernels.streaming.tiles import (
    differences,
    load_points,
    over_lanes,
    place,
    store_points,
    sweep,
    tile_rows,
)


@triton.jit
def kde_kernel(
    z, z_b, z_n, z_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    shift, mean, log_density,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """m - z, m and log p̂ of one block of queries of one group; results are contiguous."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    least, total, step = sweep(
        x, lane, scale, refs + b * r_b, r_m, r_d, refs, 0, 0, 0.0, M, D, ROWS, LANES, True, False
    )
    inside = inside & (lane == 0)
    at = (b * N + n) * D
    store_points(shift, at, 1, step, inside, D)
    centroid = ()
    for d in tl.static_range(D):
        centroid = centroid + (x[d] + step[d],)
    store_points(mean, at, 1, centroid, inside, D)
    log_p = normalized_log_density(total, least, variance, M, D)
    tl.store(log_density + b * N + n, log_p.to(log_density.dtype.element_ty), mask=inside)


@triton.jit
def logit_cotangent(e, w, step, v, g, D: tl.constexpr):
    """c_j = w_j ((r_j - m)·v + g), the cotangent of the logit of reference point j; queries in columns or in rows."""
    along = tl.zeros_like(w)
    for d in tl.static_range(D):
        along += (e[d] - step[d]) * v[d]
    return w * (along + g)


@triton.jit
def kde_backward_queries_kernel(
    z, z_b, z_n, z_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    g_shift, gs_b, gs_n, gs_d, g_mean, gm_b, gm_n, gm_d, g_log_density, gl_b, gl_n,
    g_z, g_sigma2, statistics,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and σ², and per query the `statistics` `[B, N, 2 + D]` for `kde_backward_refs_kernel`: least
    distance, total of the weights and m - z."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    base = refs + b * r_b
    least, total, step = sweep(x, lane, scale, base, r_m, r_d, refs, 0, 0, 0.0, M, D, ROWS, LANES, True, False)
    at = (b * N + n) * (2 + D)
    written = inside & (lane == 0)
    tl.store(statistics + at, least, mask=written)
    tl.store(statistics + at + 1, total, mask=written)
    store_points(statistics, at + 2, 1, step, written, D)

    of_shift = load_points(g_shift + b * gs_b, n * gs_n, gs_d, inside, D, ACC)
    of_mean = load_points(g_mean + b * gm_b, n * gm_n, gm_d, inside, D, ACC)
    g = tl.load(g_log_density + b * gl_b + n * gl_n, mask=inside, other=0.0).to(ACC)
    v = ()
    gradient = ()
    steps = ()
    for d in tl.static_range(D):
        v = v + ((of_shift[d] + of_mean[d])[None, :],)
        steps = steps + (step[d][None, :],)
        gradient = gradient + (tl.zeros([COLUMNS * LANES], ACC),)
    of_variance = tl.zeros([COLUMNS * LANES], ACC)
    for start in range(0, M, ROWS * LANES):
        j = tile_rows(start, lane, ROWS, LANES)
        e, a = differences(x, base, refs, j * r_m, r_d, j, 0, 0.0, j < M, D, False)
        w = tl.exp2((least[None, :] - a) * scale[None, :]) / total[None, :]
        c = logit_cotangent(e, w, steps, v, g[None, :], D)
        summed = ()
        for d in tl.static_range(D):
            summed = summed + (gradient[d] + tl.sum(c * e[d], 0),)
        gradient = summed
        of_variance += tl.sum(tl.where(j < M, c * a, 0.0), 0)
    result = ()
    for d in tl.static_range(D):
        result = result + (over_lanes(gradient[d], LANES) / variance - of_shift[d],)
    store_points(g_z, (b * N + n) * D, 1, result, written, D)
    of_variance = 0.5 * (over_lanes(of_variance, LANES) / variance - D * g) / variance
    tl.store(g_sigma2 + b * N + n, of_variance.to(g_sigma2.dtype.element_ty), mask=written)


@triton.jit
def kde_backward_refs_kernel(
    z, z_b, z_n, z_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    g_shift, gs_b, gs_n, gs_d, g_mean, gm_b, gm_n, gm_d, g_log_density, gl_b, gl_n,
    statistics, g_refs,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Cotangent of one block of reference points, a sum over queries: reference points in columns, queries in rows."""
    b, j, inside, lane = place(M, COLUMNS, LANES)
    r = load_points(refs + b * r_b, j * r_m, r_d, inside, D, ACC)
    gradient = ()
    for _ in tl.static_range(D):
        gradient = gradient + (tl.zeros([COLUMNS * LANES], ACC),)
    for start in range(0, N, ROWS * LANES):
        n = tile_rows(start, lane, ROWS, LANES)
        row = n < N
        x = load_points(z + b * z_b, n * z_n, z_d, row, D, ACC)
        variance = tl.load(sigma2 + b * s_b + n * s_n, mask=row, other=1.0).to(ACC)
        at = (b * N + n) * (2 + D)
        least = tl.load(statistics + at, mask=row, other=0.0)
        total = tl.load(statistics + at + 1, mask=row, other=1.0)
        step = load_points(statistics, at + 2, 1, row, D, ACC)
        of_shift = load_points(g_shift + b * gs_b, n * gs_n, gs_d, row, D, ACC)
        of_mean = load_points(g_mean + b * gm_b, n * gm_n, gm_d, row, D, ACC)
        g = tl.load(g_log_density + b * gl_b + n * gl_n, mask=row, other=0.0).to(ACC)
        e = ()
        v = ()
        a = tl.zeros([ROWS, COLUMNS * LANES], ACC)
        for d in tl.static_range(D):
            difference = r[d][None, :] - x[d]
            a += difference * difference
            e = e + (difference,)
            v = v + (of_shift[d] + of_mean[d],)
        w = tl.where(row, tl.exp2((least - a) * (HALF_LOG2_E / variance)) / total, 0.0)
        c = logit_cotangent(e, w, step, v, g, D) / variance
        summed = ()
        for d in tl.static_range(D):
            summed = summed + (gradient[d] + tl.sum(w * v[d] - c * e[d], 0),)
        gradient = summed
    result = ()
    for d in tl.static_range(D):
        result = result + (over_lanes(gradient[d], LANES),)
    store_points(g_refs, (b * M + j) * D, 1, result, inside & (lane == 0), D)
