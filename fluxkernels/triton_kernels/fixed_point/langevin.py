"""Exponential Langevin chain (Eq. 8) in Gram space, in fixed point.

A point of the chain is a multiple of x0, plus a combination C of the reference points R, plus noise. Its weights need
only its inner products with R, which obey L <- e^{-h} L + (1-e^{-h}) w RRᵀ + σ√(1-e^{-2h}) ξRᵀ. A chain therefore takes
one product [x0; noise; R] Rᵀ, all steps on matrices of the size of L, and one product of combinations with R.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: C901, PLR0912, PLR0913, PLR0915
import triton
import triton.language as tl

from fluxkernels.triton_kernels.differences import load_row, load_tile, squared_distances
from fluxkernels.triton_kernels.fixed_point.kde import LOG2_E, TOLERANCE
from fluxkernels.triton_kernels.fixed_point.numbers import (
    LOWEST,
    ONE,
    add_products,
    as_long,
    digits,
    exponent_above,
    largest,
    nearest_word,
    power_of_two,
    sum_of,
    total_of,
    word_of,
)
from fluxkernels.triton_kernels.fixed_point.points import centered, finite_extent, store_words
from fluxkernels.triton_kernels.philox import CHAIN, START, normal_tile
from fluxkernels.triton_kernels.scalars import rounded, step_sizes

# Largest magnitude of a normal number that Philox makes.
LARGEST_NORMAL = tl.constexpr(6.8)


@triton.jit
def noise_tile(
    noise, noise_k, noise_n, noise_d, seed, stream, step, at, b, n, d, N, D,
    SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ξ of a step for queries n and coordinates d, as float64: made from the seed, or entry `at` of the noise."""
    if SEEDED:
        value = normal_tile(tl.load(seed), stream, step, b * N + n, d, D, WHOLE, ACC)
        value = tl.where((n < N)[:, None] & (d < D)[None, :], value, 0.0).to(tl.float64)
    else:
        value = load_tile(noise + as_long(at) * noise_k, n, noise_n, N, d, noise_d, D)
    return value


@triton.jit
def chain_extent_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, noise, noise_k, noise_b, noise_n, noise_d,
    extents,
    N, M, D, noises, parts,
    SEEDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maxima `[B, 4, parts]` of the coordinates of x and refs about the origin, and of the noise where it is given; the
    last row is 0, or NaN if a reference point is not finite."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    x += b * x_b
    refs += b * r_b
    noise += b * noise_b
    of_x = tl.zeros([ROWS, BLOCK], tl.float32)
    of_refs = tl.zeros([ROWS, BLOCK], tl.float32)
    of_noise = tl.zeros([ROWS, BLOCK], tl.float32)
    bad = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        origin = load_row(refs, d, r_d, D)
        for first in range(part * ROWS, N, parts * ROWS):
            n = first + tl.arange(0, ROWS)
            of_x = finite_extent(of_x, centered(load_tile(x, n, x_n, N, d, x_d, D), n, N, origin))
            if not SEEDED:
                for k in range(noises):
                    value = load_tile(noise + as_long(k) * noise_k, n, noise_n, N, d, noise_d, D)
                    of_noise = finite_extent(of_noise, value)
        for first in range(part * ROWS, M, parts * ROWS):
            j = first + tl.arange(0, ROWS)
            point = centered(load_tile(refs, j, r_m, M, d, r_d, D), j, M, origin)
            of_refs = finite_extent(of_refs, point)
            bad += (point * 0).to(tl.float32)
    extents += 4 * b * parts + part
    tl.store(extents, tl.max(tl.max(of_x, 1), 0))
    tl.store(extents + parts, tl.max(tl.max(of_refs, 1), 0))
    tl.store(extents + 2 * parts, tl.max(tl.max(of_noise, 1), 0))
    tl.store(extents + 3 * parts, tl.sum(tl.sum(bad, 1), 0))


@triton.jit(do_not_specialize=["first_group"])
def chain_points_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, tau, a_b,
    seed, noise, noise_k, noise_b, noise_n, noise_d,
    extents, parts,
    left, right, exponents, valid, x0_out, drifts,
    N, M, D, width, steps, noises, first_group,
    PASS: tl.constexpr, SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Words of `left` [x0; noise; R] `[B, (1 + noises)·N + M, width]` and of `right` R, a tile of points per program.

    Noise is multiplied by its step size. With PASS, x0 is x + σ n0, rounded, and goes to `x0_out`. `drifts` `[B, N, D]`
    has the end of the chain without the reference points, about the origin. A query's program makes all of its noise,
    which depends on its place among all groups: the first one here is `first_group`.
    """
    across = tl.cdiv(width, BLOCK)
    blocks_x = tl.cdiv(N, ROWS)
    blocks = (blocks_x + tl.cdiv(M, ROWS)) * across
    program = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = program // across
    d = (program % across) * BLOCK + tl.arange(0, BLOCK)
    x += b * x_b
    refs += b * r_b
    noise += b * noise_b
    variance = tl.load(sigma2 + b * s_b).to(tl.float64)
    pull, spread = step_sizes(variance, tl.load(tau + b * a_b).to(tl.float64), steps)
    extents += 4 * b * parts
    e_refs = exponent_above(largest(extents + parts, parts, 128))
    of_noise = LARGEST_NORMAL if SEEDED else largest(extents + 2 * parts, parts, 128)
    reach = largest(extents, parts, 128)
    if PASS:
        reach += tl.sqrt(variance).to(tl.float32) * of_noise
    reach = tl.maximum(reach, spread.to(tl.float32) * of_noise)
    e_left = tl.maximum(exponent_above(reach * 1.000001), e_refs)
    height = as_long((1 + noises) * N + M)
    left += b * height * width
    origin = load_row(refs, d, r_d, D)
    if block < blocks_x:
        n = block * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = (b * N + n)[:, None] * D + d[None, :]
        point = load_tile(x, n, x_n, N, d, x_d, D)
        if PASS:
            xi = noise_tile(
                noise, noise_k, noise_n, noise_d, seed, START, 0, 0, first_group + b, n, d, N, D, SEEDED, WHOLE, ACC
            )
            start = rounded(point + tl.sqrt(variance) * xi, x0_out.dtype.element_ty)
            tl.store(x0_out + at, start, mask=inside)
            point = start.to(tl.float64)
        point = centered(point, n, N, origin)
        store_words(left, n, N, d, width, point, e_left)
        for k in range(steps):
            xi = noise_tile(
                noise, noise_k, noise_n, noise_d, seed, CHAIN, k, k + PASS, first_group + b, n, d, N, D,
                SEEDED, WHOLE, ACC,
            )  # fmt: skip
            if k < noises:
                store_words(left + (1 + k) * as_long(N) * width, n, N, d, width, spread * xi, e_left)
            point = point - pull * point + spread * xi
        tl.store(drifts + at, point, mask=inside)
        bad = (point * 0).to(tl.float32)  # also of noise and step sizes that are not finite
        invalid = tl.sum(bad, 1) + sum_of(extents + 3 * parts, parts, 128)
        tl.store(valid + (b * N + n) * across + program % across, invalid, mask=n < N)
    else:
        j = (block - blocks_x) * ROWS + tl.arange(0, ROWS)
        point = centered(load_tile(refs, j, r_m, M, d, r_d, D), j, M, origin)
        store_words(left + (height - M) * width, j, M, d, width, point, e_left)
        store_words(right + b * M * width, j, M, d, width, point, e_refs)
    if program == 0:
        tl.store(exponents + 2 * b, e_left)
        tl.store(exponents + 2 * b + 1, e_refs)


@triton.jit
def fraction(number):
    """(p, s) with number ≈ p 2^(-31-s), for a float64 in [0, 1]: p has its leading 31 bits."""
    s = tl.minimum(tl.maximum(-exponent_above(number.to(tl.float32)), 0), 31)
    return tl.floor(number * power_of_two(31 + s) + 0.5).to(tl.int64), s


@triton.jit
def times_fraction(value, p, s):
    """`value` times the fraction (p, s) of an int64 below 2^62 in size, up to two units."""
    high, low = value >> 32, value & 0xFFFFFFFF
    return ((high * p + ((low * p) >> 32)) << 1) >> s


@triton.jit
def toward(old, new, of_old, of_new):
    """A mean of two words in [0, 2^30], with parts in units of 2^-32."""
    mean = tl.umulhi(old.to(tl.uint32), of_old) + tl.umulhi(new.to(tl.uint32), of_new)
    return mean.to(tl.int32)


@triton.jit
def chain_kernel(
    products, exponents, sigma2, s_b, tau, a_b,
    words, combinations, heaviest, sensitive,
    N, M, D, steps, noises, width,
    PASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS chains, on their rows of `products` `[B, (1 + noises)·N + M, M]`, which change in place.

    Writes to `combinations` `[B, 3, N, width]`, as words: C, and the coefficients relative to the heaviest reference
    point of the weights at the end and at the start (with PASS). `heaviest` `[B, 2, N]` are those points at start and
    end. `sensitive` are the chains with weights that need float64. Every mean in Gram space is relative to the
    heaviest reference point, too. `words` `[B, M, width]` is memory for RRᵀ as words, the same of every program.
    """
    blocks = tl.cdiv(N, ROWS)
    n = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    known = n < N
    n = tl.minimum(n, N - 1).to(tl.int64)  # loads need no mask
    height = as_long((1 + noises) * N + M)
    products += b * height * M
    of_noise = as_long(N) * M
    gram = products + (1 + noises) * of_noise
    state = products + n * M
    drift = combinations + (b * 3 * N + n) * width
    current = drift + as_long(N) * width
    first = current + as_long(N) * width
    e_x, e_refs = tl.load(exponents + 2 * b), tl.load(exponents + 2 * b + 1)
    variance = tl.load(sigma2 + b * s_b).to(tl.float64)
    pull, _spread = step_sizes(variance, tl.load(tau + b * a_b).to(tl.float64), steps)
    p, s = fraction(pull)
    of_new = tl.floor(tl.minimum(pull * 4294967296.0, 4294967295.0)).to(tl.uint32)
    of_old = tl.floor(tl.minimum((1 - pull) * 4294967296.0, 4294967295.0)).to(tl.uint32)
    scale = tl.minimum(power_of_two(e_x + e_refs - 44) * LOG2_E / variance, 1e38).to(tl.float32)

    # Inner products of reference points as words: bits that are dropped from them, from the largest |r|².
    largest_square = tl.zeros([], tl.int64)
    for start in range(0, M, BLOCK):
        j = (start + tl.arange(0, BLOCK)).to(tl.int64)
        largest_square = tl.maximum(largest_square, tl.max(tl.load(gram + j * (M + 1), mask=j < M, other=0), 0))
    dropped = tl.maximum(exponent_above(largest_square.to(tl.float32) * 1.000001) - 30, 0)
    words += b * M * width
    for above in range(0, M, ROWS):
        i = (above + tl.arange(0, ROWS)).to(tl.int64)
        for start in range(0, width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = (i < M)[:, None] & (j < M)[None, :]
            word = tl.load(gram + i[:, None] * M + j[None, :], mask=inside, other=0) >> dropped
            at = (i < M)[:, None] & (j < width)[None, :]
            tl.store(words + i[:, None] * width + j[None, :], digits(word.to(tl.int32)), mask=at)
    # Errors of logits: of coordinates and units, as in the kernel of the weights, and of the words above.
    unit = power_of_two(e_x + e_refs - 44)
    radius = tl.sqrt(largest_square.to(tl.float64) * unit)
    dimensions = tl.zeros([], tl.float64) + D
    between = 2 * radius * power_of_two(e_x - 30) + (2 * radius + tl.sqrt(variance * dimensions)) * power_of_two(
        e_refs - 30
    )
    error = (0.3 * between + (44 * tl.sqrt(dimensions) + 0.3 * power_of_two(dropped)) * unit) / variance
    error = tl.minimum(error, 1e30).to(tl.float32)
    worst = tl.zeros([ROWS], tl.float32)

    for k in range(steps + PASS):
        top = tl.full([ROWS], LOWEST, tl.int64)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = (j < M)[None, :]
            half = tl.load(gram + j.to(tl.int64) * (M + 1), mask=j < M, other=0) >> 1
            u = tl.load(state[:, None] + j[None, :], mask=inside, other=LOWEST)
            top = tl.maximum(top, tl.max(tl.where(inside, u - half[None, :], LOWEST), 1))
        h = tl.full([ROWS], 2**31 - 1, tl.int32)
        heavy = tl.zeros([ROWS], tl.float32)
        others = tl.zeros([ROWS], tl.float32)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = (j < M)[None, :]
            half = tl.load(gram + j.to(tl.int64) * (M + 1), mask=j < M, other=0) >> 1
            u = tl.load(state[:, None] + j[None, :], mask=inside, other=0) - half[None, :]
            heaviest_of_all = inside & (u == top[:, None])
            h = tl.minimum(h, tl.min(tl.where(heaviest_of_all, j[None, :], 2**31 - 1), 1))
            heavy += tl.sum(tl.where(heaviest_of_all, 1.0, 0.0), 1)
            weight = tl.exp2((u - top[:, None]).to(tl.float32) * scale)
            others += tl.sum(tl.where(inside & (u != top[:, None]), weight, 0.0), 1)
        others += heavy - 1
        total = 1 + others
        worst = tl.maximum(worst, error * (others / total))
        inverse = (1 / total) * ONE
        used = tl.zeros([ROWS], tl.int32)
        for start in range(0, width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = (j < M)[None, :]
            half = tl.load(gram + j.to(tl.int64) * (M + 1), mask=j < M, other=0) >> 1
            u = tl.load(state[:, None] + j[None, :], mask=inside, other=0) - half[None, :]
            weight = tl.where(inside, tl.exp2((u - top[:, None]).to(tl.float32) * scale), 0.0)
            other = j[None, :] != h[:, None]
            word = tl.where(other, nearest_word(weight * inverse[:, None]), 0)
            used += tl.sum(word, 1)
            at = other & (j < width)[None, :] & known[:, None]
            tl.store(current[:, None] + j[None, :], digits(word), mask=at)
            if PASS:
                if k == 0:
                    tl.store(first[:, None] + j[None, :], digits(word), mask=at)
            if k < steps:
                c = tl.zeros([ROWS, BLOCK], tl.int32)
                if k > 0:
                    c = word_of(tl.load(drift[:, None] + j[None, :], mask=at, other=0))
                c = toward(c, word, of_old, of_new)
                tl.store(drift[:, None] + j[None, :], digits(c), mask=at)
        tl.store(current + h, digits(-used), mask=known)
        if PASS:
            if k == 0:
                tl.store(first + h, digits(-used), mask=known)
                tl.store(heaviest + 2 * b * N + n, h, mask=known)
            tl.store(heaviest + (2 * b + 1) * N + n, h, mask=known)
        if k < steps:
            c = tl.zeros([ROWS], tl.int32)
            if k > 0:
                c = word_of(tl.load(drift + h))
            c = toward(c, -(used - ONE), of_old, of_new)
            tl.store(drift + h, digits(c), mask=known)
        # Other threads of this program read what was stored.
        tl.debug_barrier()
        if k + 1 < steps + PASS:
            for start in range(0, M, COLUMNS):
                j = start + tl.arange(0, COLUMNS)
                inside = (j < M)[None, :]
                at = tl.minimum(j, M - 1).to(tl.int64) * width  # RRᵀ is symmetric
                s0 = tl.zeros([ROWS, COLUMNS], tl.int32)
                s1 = tl.zeros([ROWS, COLUMNS], tl.int32)
                s2 = tl.zeros([ROWS, COLUMNS], tl.int32)
                s3 = tl.zeros([ROWS, COLUMNS], tl.int32)
                s4 = tl.zeros([ROWS, COLUMNS], tl.int32)
                for inner in range(0, M, DEPTH):
                    i = inner + tl.arange(0, DEPTH)
                    w = tl.load(current[:, None] + i[None, :])
                    word = tl.load(words + at[None, :] + i[:, None])
                    s0, s1, s2, s3, s4 = add_products(w, word, s0, s1, s2, s3, s4)
                # Words of weights count 2^-30, and those of inner products 2^dropped units.
                beyond = total_of(s0, s1, s2, s3, s4)
                beyond = (beyond << tl.maximum(dropped - 14, 0)) >> tl.maximum(14 - dropped, 0)
                mean = tl.load(gram + h.to(tl.int64)[:, None] * M + j[None, :], mask=inside, other=0) + beyond
                now = tl.load(state[:, None] + j[None, :], mask=inside, other=0)
                xi = tl.load(state[:, None] + (1 + k) * of_noise + j[None, :], mask=inside, other=0)
                now += times_fraction(mean - now, p, s) + xi
                tl.store(state[:, None] + j[None, :], now, mask=inside & known[:, None])
        tl.debug_barrier()
    tl.store(sensitive + b * N + n, (worst > TOLERANCE).to(tl.int32), mask=known)


@triton.jit
def chain_results_kernel(
    sums, exponents, drifts, valid, heaviest, refs, r_b, r_m, r_d,
    x0_out, shift0_out, xt_out, shift_t_out,
    N, D, parts,
    PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_τ from its drift and combination of the reference points; with PASS, m - x at both ends too.

    `sums` `[B, 3·N, D]` (without PASS, `[B, N, D]`) are the combinations of the reference points.
    """
    blocks = tl.cdiv(D, BLOCK)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, n = row // N, row % N
    refs += b * r_b
    inside = d < D
    unit = power_of_two(tl.load(exponents + 2 * b + 1) - 44)
    invalid = tl.zeros([], tl.float32)
    for part in range(parts):
        invalid += tl.load(valid + row * parts + part)
    nothing = invalid.to(tl.float64)
    at = row * D + d
    sums += (b * (3 * N if PASS else N) + n) * D + d
    drift = tl.load(drifts + at, mask=inside, other=0.0) + nothing
    of_refs = tl.load(sums, mask=inside, other=0).to(tl.float64) * unit
    end = rounded(load_row(refs, d, r_d, D) + (drift + of_refs), xt_out.dtype.element_ty)
    tl.store(xt_out + at, end, mask=inside)
    if PASS:
        size = as_long(N) * D
        h = tl.load(heaviest + (2 * b + 1) * N + n).to(tl.int64)
        beyond = tl.load(sums + size, mask=inside, other=0).to(tl.float64) * unit
        shift = (load_row(refs + h * r_m, d, r_d, D) - end.to(tl.float64)) + beyond
        tl.store(shift_t_out + at, rounded(shift, shift_t_out.dtype.element_ty), mask=inside)
        h = tl.load(heaviest + 2 * b * N + n).to(tl.int64)
        beyond = tl.load(sums + 2 * size, mask=inside, other=0).to(tl.float64) * unit
        start = tl.load(x0_out + at, mask=inside, other=0.0).to(tl.float64)
        shift = (load_row(refs + h * r_m, d, r_d, D) - start) + beyond + nothing
        tl.store(shift0_out + at, rounded(shift, shift0_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_group"])
def chain_repair_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, tau, a_b,
    seed, noise, noise_k, noise_b, noise_n, noise_d,
    sensitive, points, weights, weights_b,
    x0_out, shift0_out, xt_out, shift_t_out,
    N, M, D, steps, first_group,
    PASS: tl.constexpr, SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chain again in float64, from differences of coordinates, if it is one of the `sensitive` ones.

    `points` `[B, N, D]` and a row of `weights`, both float64, are the program's memory.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(sensitive + row) == 0:
        return
    b, n = row // N, row % N
    x += b * x_b + n * x_n
    refs += b * r_b
    noise += b * noise_b
    one = n + tl.arange(0, 1)
    points += row * D
    weights += b * weights_b + n * M
    variance = tl.load(sigma2 + b * s_b).to(tl.float64)
    pull, spread = step_sizes(variance, tl.load(tau + b * a_b).to(tl.float64), steps)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        point = load_row(x, d, x_d, D)
        if PASS:
            xi = noise_tile(
                noise, noise_k, noise_n, noise_d, seed, START, 0, 0, first_group + b, one, d, N, D, SEEDED, WHOLE, ACC
            )
            point += tl.sqrt(variance) * tl.sum(xi, 0)
            point = rounded(point, x0_out.dtype.element_ty).to(tl.float64)
        tl.store(points + d, point, mask=d < D)
    tl.debug_barrier()
    for k in range(steps + PASS):
        nearest = tl.full([], float("inf"), tl.float64)
        for start in range(0, M, 64):
            j = start + tl.arange(0, 64)
            a = squared_distances(points, 1, refs, r_m, r_d, refs, r_m, r_d, variance, j, M, D, False, 32)
            tl.store(weights + j, a, mask=j < M)
            nearest = tl.minimum(nearest, tl.min(tl.where(j < M, a, float("inf")), 0))
        tl.debug_barrier()
        total = tl.zeros([], tl.float64)
        for start in range(0, M, 128):
            j = start + tl.arange(0, 128)
            a = tl.load(weights + j, mask=j < M, other=0.0)
            # A minimum would lose NaN.
            w = tl.exp(tl.where(a > nearest, (nearest - a) * (0.5 / variance), a * 0))
            tl.store(weights + j, w, mask=j < M)
            total += tl.sum(tl.where(j < M, w, 0.0), 0)
        tl.debug_barrier()
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            point = load_row(points, d, 1, D)
            shift = tl.zeros([BLOCK], tl.float64)
            for first in range(0, M, 4):
                j = first + tl.arange(0, 4)
                w = tl.load(weights + j, mask=j < M, other=0.0)
                ref = load_tile(refs, j, r_m, M, d, r_d, D)
                shift += tl.sum(w[:, None] * (ref - point[None, :]), 0)
            shift /= total
            at = row * D + d
            if PASS:
                if k == 0:
                    tl.store(shift0_out + at, rounded(shift, shift0_out.dtype.element_ty), mask=d < D)
                if k == steps:
                    tl.store(shift_t_out + at, rounded(shift, shift_t_out.dtype.element_ty), mask=d < D)
            if k < steps:
                xi = noise_tile(
                    noise, noise_k, noise_n, noise_d, seed, CHAIN, k, k + PASS, first_group + b, one, d, N, D,
                    SEEDED, WHOLE, ACC,
                )  # fmt: skip
                point += pull * shift + spread * tl.sum(xi, 0)
                if k == steps - 1:  # the mean at the end is that of the rounded end
                    end = rounded(point, xt_out.dtype.element_ty)
                    tl.store(xt_out + at, end, mask=d < D)
                    point = end.to(tl.float64)
                tl.store(points + d, point, mask=d < D)
        tl.debug_barrier()
