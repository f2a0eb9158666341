"""Averages of values under a kernel in few dimensions, with weights of the reference points, and their derivatives.

The cost of a pair is a number in powers of two that counts against its weight: t·s - b, with t the squared distance or,
with LAPLACE, the distance, s its scale and b the log of the weight of the reference point. Without weights the cost is
t, and its differences are scaled. Packed numbers of a reference point are its coordinates, COUNT columns of its values,
with WEIGHTED its -b, and with PER_REF its scale. With COUNT = 0 the reference points themselves are averaged, as their
differences from the query.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0915
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E
from fluxkernels.triton_kernels.streaming.tiles import (
    far,
    load_points,
    load_tile,
    over_lanes,
    place,
    store_points,
    weight,
    zeros,
)

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def absent(ACC: tl.constexpr):
    """Cost of a reference point that has no weight: above all others, and below that of a pair that is left out."""
    return tl.full([], 1e300 if ACC == tl.float64 else 1e38, ACC)


@triton.jit
def all_absent(least, ACC: tl.constexpr):
    """Return whether no pair of a query has a weight."""
    return least > 0.5 * absent(ACC)


@triton.jit
def scale_of(variance, LAPLACE: tl.constexpr):
    """Powers of two per squared distance, log₂e/2σ², or with LAPLACE per distance, log₂e/σ."""
    if LAPLACE:
        scale = LOG2_E / tl.sqrt(variance)
    else:
        scale = HALF_LOG2_E / variance
    return scale


@triton.jit
def kernel_average_pack_kernel(
    refs, r_b, r_m, r_d, values, v_b, v_m, v_d, log_weights, l_b, l_m, tops, t_b, sigma2, s_b, s_m,
    packed, p_b, p_c,
    M, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr,
    LOGS: tl.constexpr, PER_REF: tl.constexpr, LAPLACE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """WIDTH adjacent numbers of every reference point, for each COUNT columns of the values.

    Logs are relative to the largest of the group, of `tops`; without LOGS all are zero.
    """
    b, j, inside, lane = place(M, COLUMNS, LANES)
    written = inside & (lane == 0)
    chunk = tl.program_id(1)
    row = packed + b * p_b + chunk * p_c + j * WIDTH
    store_points(row, 0, 1, load_points(refs + b * r_b, j * r_m, r_d, inside, D, ACC), written, D)
    for u in tl.static_range(COUNT):
        column = tl.zeros_like(j) + chunk * COUNT + u
        value = tl.load(values + b * v_b + j * v_m + column * v_d, mask=written & (column < V), other=0.0).to(ACC)
        tl.store(row + D + u, value, mask=written)
    if WEIGHTED:
        cost = tl.zeros(j.shape, ACC)
        if LOGS:
            top = tl.load(tops + b * t_b).to(ACC)
            log = tl.load(log_weights + b * l_b + j * l_m, mask=inside, other=0.0).to(ACC)
            cost = tl.where(log == float("-inf"), absent(ACC), (top - log) * LOG2_E)
        tl.store(row + D + COUNT, cost, mask=written)
    if PER_REF:
        variance = tl.load(sigma2 + b * s_b + j * s_m, mask=inside, other=1.0).to(ACC)
        tl.store(row + D + COUNT + 1, scale_of(variance, LAPLACE), mask=written)


@triton.jit
def cost_of_pair(
    x, numbers, scale, k, own, inside,
    D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, PER_REF: tl.constexpr,
    EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
):  # fmt: skip
    """(r - x as a tuple, |r - x|², t, cost) for entry k of a tuple of packed numbers; `own` is the entry left out."""
    e = ()
    a = 0.0
    for d in tl.static_range(D):
        difference = numbers[k * WIDTH + d] - x[d]
        e = e + (difference,)
        a = difference * difference if d == 0 else tl.fma(difference, difference, a)
    t = tl.sqrt(a) if LAPLACE else a
    cost = t
    if WEIGHTED:
        # Fused by name: the compiler could fuse a product with the difference of costs instead, and the rounding of the
        # other cost, of any size for far queries, would remain.
        of_distance = numbers[k * WIDTH + D + COUNT + 1] if PER_REF else scale
        cost = tl.fma(t, of_distance, numbers[k * WIDTH + D + COUNT])
    if EXCLUDE:
        inside = inside & (own != k)
    return e, a, t, tl.where(inside, cost, far(x[0].dtype))


@triton.jit
def add_numbers(
    least, total, sums, x, scale, numbers, own, inside,
    D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, PER_REF: tl.constexpr,
    EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the ROWS reference points of a tile, or those `inside`, to the softmax (least, total, sums)."""
    e = ()
    cost = ()
    for k in tl.static_range(ROWS):
        difference, _, _, of_pair = cost_of_pair(
            x, numbers, scale, k, own, inside, D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE
        )
        e = e + difference
        cost = cost + (of_pair,)
    lower = least
    for k in tl.static_range(ROWS):
        lower = tl.minimum(lower, cost[k])
    unit = 1.0 if WEIGHTED else scale
    keep = weight(least, lower, unit)
    total = total * keep
    kept = ()
    for u in tl.static_range(COUNT if COUNT > 0 else D):
        kept = kept + (sums[u] * keep,)
    for k in tl.static_range(ROWS):
        w = weight(cost[k], lower, unit)
        total += w
        added = ()
        for u in tl.static_range(COUNT if COUNT > 0 else D):
            added = added + (kept[u] + w * (numbers[k * WIDTH + D + u] if COUNT > 0 else e[k * D + u]),)
        kept = added
    return lower, total, kept


@triton.jit
def sweep_numbers(
    x, n, lane, scale, numbers, M,
    D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, PER_REF: tl.constexpr,
    EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Online softmax over all reference points: (least cost, total of the weights relative to its own, averages)."""
    ACC: tl.constexpr = x[0].dtype
    least = tl.zeros(x[0].shape, ACC) + far(ACC)
    total = tl.zeros(x[0].shape, ACC)
    sums = zeros(x[0], COUNT if COUNT > 0 else D)
    at = numbers + lane * (ROWS * WIDTH)
    own = (n - lane * ROWS).to(tl.int32)
    whole = M // (ROWS * LANES)
    for _ in range(whole):
        tile = load_tile(at, ROWS * WIDTH, ACC)
        at += ROWS * LANES * WIDTH
        least, total, sums = add_numbers(
            least, total, sums, x, scale, tile, own, True,
            D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE, ROWS,
        )  # fmt: skip
        own -= ROWS * LANES
    for start in range(whole * (ROWS * LANES), M, LANES):
        j = start + lane
        tile = load_points(numbers, j.to(tl.int64) * WIDTH, 1, j < M, WIDTH, ACC)
        least, total, sums = add_numbers(
            least, total, sums, x, scale, tile, (n - j).to(tl.int32), j < M,
            D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE, 1,
        )  # fmt: skip
    keep = tl.full(total.shape, 1.0, ACC)
    if LANES > 1:
        lanes = tl.reshape(least, [LANES, least.shape[0] // LANES])
        lower = tl.reshape(tl.broadcast_to(tl.min(lanes, 0)[None, :], lanes.shape), least.shape)
        keep = weight(least, lower, 1.0 if WEIGHTED else scale)
        least, total = lower, over_lanes(total * keep, LANES)
    average = ()
    for u in tl.static_range(COUNT if COUNT > 0 else D):
        average = average + (over_lanes(sums[u] * keep, LANES) / total,)
    return least, total, average


@triton.jit
def kernel_average_kernel(
    z, z_b, z_n, z_d, numbers, p_b, p_c, sigma2, s_b, s_n, tops, t_b,
    shift, average, log_sum,
    N, M, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr,
    LOGS: tl.constexpr, PER_REF: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Average over one block of queries of one group, of COUNT columns of the values, and the log of the total."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    chunk = tl.program_id(1)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    scale = tl.full(n.shape, 1.0, ACC)
    if not PER_REF:
        scale = scale_of(tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC), LAPLACE)
    least, total, found = sweep_numbers(
        x, n, lane, scale, numbers + b * p_b + chunk * p_c, M,
        D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE, ROWS, LANES,
    )  # fmt: skip
    inside = inside & (lane == 0)
    none = all_absent(least, ACC)
    row = b * N + n
    if COUNT > 0:
        for u in tl.static_range(COUNT):
            column = tl.zeros_like(n) + chunk * COUNT + u
            value = tl.where(none, float("nan"), found[u]).to(average.dtype.element_ty)
            tl.store(average + row * V + column, value, mask=inside & (column < V))
    else:
        step = ()
        centroid = ()
        for d in tl.static_range(D):
            step = step + (tl.where(none, float("nan"), found[d]),)
            centroid = centroid + (x[d] + step[d],)
        store_points(shift, row * D, 1, step, inside, D)
        store_points(average, row * D, 1, centroid, inside, D)
    result = tl.log(total) - least * (1.0 if WEIGHTED else scale) * LN_2
    if LOGS:
        result += tl.load(tops + b * t_b).to(ACC)
    result = tl.where(none, float("-inf"), result).to(log_sum.dtype.element_ty)
    tl.store(log_sum + row, result, mask=inside & (tl.zeros_like(n) + chunk == 0))


@triton.jit
def pull_of_pair(a, numbers, k, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, PER_REF: tl.constexpr,
                 LAPLACE: tl.constexpr):  # fmt: skip
    """Derivative of a cost in half the squared distance, in units of the query's own scale; 0 where a distance has
    none."""
    pull = tl.full(a.shape, 1.0, a.dtype)
    if LAPLACE:
        pull = tl.where(a > 0, tl.rsqrt(a), 0.0)
    if PER_REF:
        pull *= numbers[k * WIDTH + D + COUNT + 1]
    return pull


@triton.jit
def in_nats(pull, LAPLACE: tl.constexpr):
    """Pull of an exponent of e, from scale times `pull_of_pair`."""
    return pull * (LN_2 if LAPLACE else 2 * LN_2)


@triton.jit
def variance_unit(variance, LAPLACE: tl.constexpr):
    """Derivative of minus an exponent in σ² over t: 1/2σ⁴, or with LAPLACE 1/2σ³."""
    return 0.5 / (variance * tl.sqrt(variance)) if LAPLACE else 0.5 / (variance * variance)


@triton.jit
def add_query_cotangents(
    gradient, of_variance, x, scale, least, average, v, g, numbers, own, inside, k,
    D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, PER_REF: tl.constexpr,
    EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
):  # fmt: skip
    """Add Σ_d c pull (r - x)_d and c t of reference point k, where c is the cotangent of its logit."""
    e, a, t, cost = cost_of_pair(
        x, numbers, scale, k, own, inside, D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE
    )  # fmt: skip
    along = g
    for u in tl.static_range(COUNT if COUNT > 0 else D):
        along += ((numbers[k * WIDTH + D + u] if COUNT > 0 else e[u]) - average[u]) * v[u]
    c = weight(cost, least, 1.0 if WEIGHTED else scale) * along
    pulled = c * pull_of_pair(a, numbers, k, D, COUNT, WIDTH, PER_REF, LAPLACE)
    summed = ()
    for d in tl.static_range(D):
        summed = summed + (gradient[d] + pulled * e[d],)
    return summed, of_variance + c * t


@triton.jit
def kernel_average_backward_queries_kernel(
    z, z_b, z_n, z_d, numbers, p_b, p_c, sigma2, s_b, s_n,
    g_shift, gs_b, gs_n, gs_d, g_average, ga_b, ga_n, ga_d, g_log_sum, gl_b, gl_n,
    g_z, g_sigma2, queries, q_b, q_c,
    N, M, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, QUERY_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr, PER_REF: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and σ² from COUNT columns of the average, and with the first columns from the log-sum.

    `queries` are QUERY_WIDTH adjacent numbers per query, which `kernel_average_backward_refs_kernel` reads: the query,
    its average, the cotangents of average and log-sum over its total, its scale and least cost.
    """
    C: tl.constexpr = COUNT if COUNT > 0 else D
    b, n, inside, lane = place(N, COLUMNS, LANES)
    chunk = tl.program_id(1)
    groups = tl.num_programs(0) // tl.cdiv(N, COLUMNS)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    scale = tl.full(n.shape, 1.0, ACC)
    variance = scale
    if not PER_REF:
        variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
        scale = scale_of(variance, LAPLACE)
    base = numbers + b * p_b + chunk * p_c
    least, total, found = sweep_numbers(
        x, n, lane, scale, base, M, D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE, ROWS, LANES
    )  # fmt: skip
    none = all_absent(least, ACC)
    least = tl.where(none, 0.0, least)
    inverse = tl.where(none, 0.0, 1 / total)
    g = tl.load(g_log_sum + b * gl_b + n * gl_n, mask=inside & (tl.zeros_like(n) + chunk == 0), other=0.0).to(ACC)
    g = tl.where(none, 0.0, g)
    average = ()
    v = ()
    for u in tl.static_range(C):
        column = tl.zeros_like(n) + chunk * C + u
        given = inside & (column < V)
        of_average = tl.load(g_average + b * ga_b + n * ga_n + column * ga_d, mask=given, other=0.0).to(ACC)
        if COUNT == 0:
            of_average += tl.load(g_shift + b * gs_b + n * gs_n + column * gs_d, mask=given, other=0.0).to(ACC)
        average = average + (tl.where(none, 0.0, found[u]),)
        v = v + (tl.where(none, 0.0, of_average),)
    gradient, of_variance = zeros(x[0], D), tl.zeros(x[0].shape, ACC)
    at = base + lane * (ROWS * WIDTH)
    own = (n - lane * ROWS).to(tl.int32)
    whole = M // (ROWS * LANES)
    for _ in range(whole):
        tile = load_tile(at, ROWS * WIDTH, ACC)
        at += ROWS * LANES * WIDTH
        for k in tl.static_range(ROWS):
            gradient, of_variance = add_query_cotangents(
                gradient, of_variance, x, scale, least, average, v, g, tile, own, True, k,
                D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE,
            )  # fmt: skip
        own -= ROWS * LANES
    for start in range(whole * (ROWS * LANES), M, LANES):
        j = start + lane
        tile = load_points(base, j.to(tl.int64) * WIDTH, 1, j < M, WIDTH, ACC)
        gradient, of_variance = add_query_cotangents(
            gradient, of_variance, x, scale, least, average, v, g, tile, (n - j).to(tl.int32), j < M, 0,
            D, COUNT, WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE,
        )  # fmt: skip
    written = inside & (lane == 0)
    factor = in_nats(inverse * scale, LAPLACE)
    row = (chunk * groups + b) * N + n
    result = ()
    scaled = ()
    for d in tl.static_range(D):
        of_point = over_lanes(gradient[d], LANES) * factor
        if COUNT == 0:
            of_point -= tl.load(g_shift + b * gs_b + n * gs_n + d * gs_d, mask=inside, other=0.0).to(ACC)
        result = result + (of_point,)
    store_points(g_z, row * D, 1, result, written, D)
    if not PER_REF:
        of_variance = over_lanes(of_variance, LANES) * inverse * variance_unit(variance, LAPLACE)
        tl.store(g_sigma2 + row, of_variance.to(g_sigma2.dtype.element_ty), mask=written)
    for u in tl.static_range(C):
        scaled = scaled + (v[u] * inverse,)
    for_refs = x + average + scaled + (g * inverse, scale, least)
    store_points(queries + b * q_b + chunk * q_c + n * QUERY_WIDTH, 0, 1, for_refs, written, D + 2 * C + 3)


@triton.jit
def add_ref_cotangents(
    of_point, of_values, of_log, of_variance, r, tile, k, own, inside,
    D: tl.constexpr, COUNT: tl.constexpr, QUERY_WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, PER_REF: tl.constexpr,
    EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
):  # fmt: skip
    """Add the cotangents of a reference point, whose packed numbers are `r`, from query k of a tuple of numbers."""
    C: tl.constexpr = COUNT if COUNT > 0 else D
    first: tl.constexpr = D + 2 * C
    x = ()
    for d in tl.static_range(D):
        x = x + (tile[k * QUERY_WIDTH + d],)
    scale, least = tile[k * QUERY_WIDTH + first + 1], tile[k * QUERY_WIDTH + first + 2]
    e, a, t, cost = cost_of_pair(x, r, scale, 0, own - k, inside, D, COUNT, 0, WEIGHTED, PER_REF, EXCLUDE, LAPLACE)
    along = tile[k * QUERY_WIDTH + first]
    w = weight(cost, least, 1.0 if WEIGHTED else scale)
    values = ()
    for u in tl.static_range(C):
        v = tile[k * QUERY_WIDTH + D + C + u]
        along += ((r[D + u] if COUNT > 0 else e[u]) - tile[k * QUERY_WIDTH + D + u]) * v
        values = values + (of_values[u] + w * v,)
    c = w * along
    pulled = c * scale * pull_of_pair(a, r, 0, D, COUNT, 0, PER_REF, LAPLACE)
    points = ()
    for d in tl.static_range(D):
        points = points + (of_point[d] + pulled * e[d],)
    return points, values, of_log + c, of_variance + c * t


@triton.jit
def kernel_average_backward_refs_kernel(
    numbers, p_b, p_c, queries, q_b, q_c, sigma2, s_b, s_m,
    g_refs, g_values, g_logs, g_sigma2,
    N, M, V,
    D: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, QUERY_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr, PER_REF: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Cotangents of one block of reference points and their values, sums over queries, which stream past them."""
    C: tl.constexpr = COUNT if COUNT > 0 else D
    b, j, inside, lane = place(M, COLUMNS, LANES)
    chunk = tl.program_id(1)
    groups = tl.num_programs(0) // tl.cdiv(M, COLUMNS)
    r = load_points(numbers + b * p_b + chunk * p_c, j * WIDTH, 1, inside, WIDTH, ACC)
    of_point, of_values = zeros(r[0], D), zeros(r[0], C)
    of_log, of_variance = tl.zeros(r[0].shape, ACC), tl.zeros(r[0].shape, ACC)
    base = queries + b * q_b + chunk * q_c
    at = base + lane * (ROWS * QUERY_WIDTH)
    own = (j - lane * ROWS).to(tl.int32)
    whole = N // (ROWS * LANES)
    for _ in range(whole):
        tile = load_tile(at, ROWS * QUERY_WIDTH, ACC)
        at += ROWS * LANES * QUERY_WIDTH
        for k in tl.static_range(ROWS):
            of_point, of_values, of_log, of_variance = add_ref_cotangents(
                of_point, of_values, of_log, of_variance, r, tile, k, own, True,
                D, COUNT, QUERY_WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE,
            )  # fmt: skip
        own -= ROWS * LANES
    for start in range(whole * (ROWS * LANES), N, LANES):
        n = start + lane
        tile = load_points(base, n.to(tl.int64) * QUERY_WIDTH, 1, n < N, QUERY_WIDTH, ACC)
        of_point, of_values, of_log, of_variance = add_ref_cotangents(
            of_point, of_values, of_log, of_variance, r, tile, 0, (j - n).to(tl.int32), n < N,
            D, COUNT, QUERY_WIDTH, WEIGHTED, PER_REF, EXCLUDE, LAPLACE,
        )  # fmt: skip
    written = inside & (lane == 0)
    row = (chunk * groups + b) * M + j
    points = ()
    for d in tl.static_range(D):
        of_ref = -in_nats(over_lanes(of_point[d], LANES), LAPLACE)
        points = points + (of_ref + (0.0 if COUNT > 0 else over_lanes(of_values[d], LANES)),)
    store_points(g_refs, row * D, 1, points, written, D)
    for u in tl.static_range(COUNT):
        column = tl.zeros_like(j) + chunk * COUNT + u
        value = over_lanes(of_values[u], LANES).to(g_values.dtype.element_ty)
        tl.store(g_values + (b * M + j) * V + column, value, mask=written & (column < V))
    if WEIGHTED:
        tl.store(g_logs + row, over_lanes(of_log, LANES).to(g_logs.dtype.element_ty), mask=written)
    if PER_REF:
        variance = tl.load(sigma2 + b * s_b + j * s_m, mask=inside, other=1.0).to(ACC)
        of_variance = over_lanes(of_variance, LANES) * variance_unit(variance, LAPLACE)
        tl.store(g_sigma2 + row, of_variance.to(g_sigma2.dtype.element_ty), mask=written)
