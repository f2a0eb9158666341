"""Exponential Langevin chain (Eq. 8) in Gram space.

A point of the chain is a multiple of x0, plus a combination C of the reference points R, plus noise. Its weights need
only its inner products with R, which obey L <- e^{-h} L + (1-e^{-h}) w RRᵀ + σ√(1-e^{-2h}) ξRᵀ. A chain therefore takes
one stacked product [x0; ξ_0; ξ_1; ...; R] Rᵀ, all steps on matrices of the size of L, and one product with R.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0915
import triton
import triton.language as tl

from fluxkernels.triton_kernels.gram.products import load_centered, load_origin, load_tile, place
from fluxkernels.triton_kernels.philox import CHAIN, START, normal_tile
from fluxkernels.triton_kernels.scalars import rounded, step_sizes


@triton.jit
def noise_tile(
    noise, noise_k, noise_n, noise_d, seed, stream, step, at, b, n, d, N, D,
    SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ξ of a step for queries n and dimensions d, as float64: made from the seed, or entry `at` of the noise."""
    if SEEDED:
        value = normal_tile(tl.load(seed), stream, step, b * N + n, d, D, WHOLE, ACC).to(tl.float64)
    else:
        value = load_tile(
            noise + (tl.zeros([], tl.int64) + at) * noise_k, n, noise_n, d, noise_d, (n < N)[:, None] & (d < D)[None, :]
        )
    return value


@triton.jit
def stack_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b,
    seed, noise, noise_k, noise_b, noise_n, noise_d,
    products,
    N, M, D, noises, span, splits,
    PASS: tl.constexpr, SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[x0; ξ_0; ...; R] Rᵀ over `span` dimensions: part of `[B, splits, (1 + noises)·N + M, M]`.

    x0 and R are relative to the origin. With PASS, x0 is x + σ n0, rounded to DTYPE.
    """
    program = tl.program_id(0)
    tiles_n, tiles_m, tiles_r = tl.cdiv(N, ROWS), tl.cdiv(M, COLUMNS), tl.cdiv(M, ROWS)
    tiles = (1 + noises) * tiles_n + tiles_r
    tile = program % tiles
    j = (program // tiles % tiles_m) * COLUMNS + tl.arange(0, COLUMNS)
    part = program // (tiles * tiles_m)
    split, b = part % splits, (part // splits).to(tl.int64)
    block = tl.minimum(tile // tiles_n, 1 + noises)  # 0: x0, k: ξ_{k-1}, the last: R
    rows = (tile - block * tiles_n) * ROWS + tl.arange(0, ROWS)
    count = tl.where(block == 1 + noises, M, N)
    x += b * x_b
    refs += b * r_b
    noise += b * noise_b
    sigma = tl.sqrt(tl.load(sigma2 + b * s_b).to(tl.float64))
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(split * span, tl.minimum((split + 1) * span, D), DEPTH):
        d = start + tl.arange(0, DEPTH)
        known = d < D
        origin = load_origin(refs, d, r_d, D)
        inside, inside_j = (rows < count)[:, None] & known[None, :], (j < M)[:, None] & known[None, :]
        if block == 0:
            left = load_tile(x, rows, x_n, d, x_d, inside)
            if PASS:
                start_noise = noise_tile(
                    noise, noise_k, noise_n, noise_d, seed, START, 0, 0, b, rows, d, N, D, SEEDED, WHOLE, ACC
                )
                left = rounded(left + sigma * start_noise, DTYPE).to(tl.float64)
            left -= origin
        elif block <= noises:
            left = noise_tile(
                noise, noise_k, noise_n, noise_d, seed, CHAIN, block - 1, block - 1 + PASS, b, rows, d, N, D,
                SEEDED, WHOLE, ACC,
            )  # fmt: skip
        else:
            left = load_centered(refs, rows, r_m, d, r_d, inside, origin)
        right = load_centered(refs, j, r_m, d, r_d, inside_j, origin)
        total = tl.dot(tl.where(inside, left, 0.0), tl.trans(right), total, out_dtype=tl.float64)
    height = tl.zeros([], tl.int64) + (1 + noises) * N + M
    products += (b * splits + split) * height * M
    tl.store(
        products + (block * N + rows)[:, None].to(tl.int64) * M + j[None, :], total,
        mask=(rows < count)[:, None] & (j < M)[None, :],
    )  # fmt: skip


@triton.jit
def chain_kernel(
    products, sigma2, s_b, tau, a_b,
    weights, coefficients, first_weights,
    N, M, steps, noises,
    PASS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS chains, on their rows of `products` `[B, (1 + noises)·N + M, M]`, which change in place.

    Writes the combination C of the reference points to `coefficients`. With PASS, weights at the start and end go to
    `first_weights` and `weights`. All are `[B, N, M]`. During the steps, `weights` holds those of the current step.
    """
    blocks = tl.cdiv(N, ROWS)
    n = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    height = tl.zeros([], tl.int64) + (1 + noises) * N + M
    products += b * height * M
    of_noise = (tl.zeros([], tl.int64) + N) * M
    gram = products + (1 + noises) * of_noise
    variance = tl.load(sigma2 + b * s_b).to(tl.float64)
    pull, spread = step_sizes(variance, tl.load(tau + b * a_b).to(tl.float64), steps)
    row = (b * N + n) * M
    for k in range(steps + PASS):
        top = tl.full([ROWS], float("-inf"), tl.float64)
        total = tl.zeros([ROWS], tl.float64)
        for start in range(0, M, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            inside = (n < N)[:, None] & (j < M)[None, :]
            square = tl.load(gram + j.to(tl.int64) * (M + 1), mask=j < M, other=0.0)
            logit = (load_tile(products, n, M, j, 1, inside) - 0.5 * square[None, :]) / variance
            logit = tl.where((j < M)[None, :], logit, float("-inf"))
            higher = tl.maximum(top, tl.max(logit, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
            top = higher
        for start in range(0, M, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            inside = (n < N)[:, None] & (j < M)[None, :]
            square = tl.load(gram + j.to(tl.int64) * (M + 1), mask=j < M, other=0.0)
            logit = (load_tile(products, n, M, j, 1, inside) - 0.5 * square[None, :]) / variance
            w = tl.exp(logit - top[:, None]) / total[:, None]
            at = row[:, None] + j[None, :]
            tl.store(weights + at, w, mask=inside)
            if k < steps:
                c = pull * w
                if k > 0:
                    c += (1 - pull) * tl.load(coefficients + at, mask=inside, other=0.0)
                tl.store(coefficients + at, c, mask=inside)
            if PASS:
                if k == 0:
                    tl.store(first_weights + at, w, mask=inside)
        # Other threads of this program read what was stored.
        tl.debug_barrier()
        if k + 1 < steps + PASS:
            for start in range(0, M, COLUMNS):
                j = start + tl.arange(0, COLUMNS)
                inside = (n < N)[:, None] & (j < M)[None, :]
                mean = tl.zeros([ROWS, COLUMNS], tl.float64)
                for inner in range(0, M, DEPTH):
                    i = inner + tl.arange(0, DEPTH)
                    w = load_tile(weights + b * N * M, n, M, i, 1, (n < N)[:, None] & (i < M)[None, :])
                    right = load_tile(gram, i, M, j, 1, (i < M)[:, None] & (j < M)[None, :])
                    mean = tl.dot(w, right, mean, out_dtype=tl.float64)
                xi = load_tile(products + (1 + k) * of_noise, n, M, j, 1, inside)
                now = load_tile(products, n, M, j, 1, inside)
                at = n.to(tl.int64)[:, None] * M + j[None, :]
                tl.store(products + at, now + pull * (mean - now) + spread * xi, mask=inside)
        tl.debug_barrier()


@triton.jit
def rebuild_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, sigma2, s_b, tau, a_b,
    seed, noise, noise_k, noise_b, noise_n, noise_d,
    weights, coefficients, first_weights,
    x0_out, shift0_out, xt_out, shift_t_out,
    N, M, D, steps,
    PASS: tl.constexpr, SEEDED: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x_τ from x0, the combination of the reference points and the noise; with PASS, x0 and m - x at both ends too."""
    b, n, d = place(N, D, ROWS, COLUMNS)
    refs += b * r_b
    noise += b * noise_b
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = (b * N + n)[:, None] * D + d[None, :]
    origin = load_origin(refs, d, r_d, D)
    variance = tl.load(sigma2 + b * s_b).to(tl.float64)
    pull, spread = step_sizes(variance, tl.load(tau + b * a_b).to(tl.float64), steps)

    start_mean = tl.zeros([ROWS, COLUMNS], tl.float64)
    drift = tl.zeros([ROWS, COLUMNS], tl.float64)
    end_mean = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, M, DEPTH):
        j = start + tl.arange(0, DEPTH)
        known = (j < M)[:, None] & (d < D)[None, :]
        right = load_centered(refs, j, r_m, d, r_d, known, origin)
        pairs = (n < N)[:, None] & (j < M)[None, :]
        drift = tl.dot(load_tile(coefficients + b * N * M, n, M, j, 1, pairs), right, drift, out_dtype=tl.float64)
        if PASS:
            start_mean = tl.dot(
                load_tile(first_weights + b * N * M, n, M, j, 1, pairs), right, start_mean, out_dtype=tl.float64
            )
            end_mean = tl.dot(load_tile(weights + b * N * M, n, M, j, 1, pairs), right, end_mean, out_dtype=tl.float64)

    point = load_tile(x + b * x_b, n, x_n, d, x_d, inside)
    if PASS:
        xi = noise_tile(noise, noise_k, noise_n, noise_d, seed, START, 0, 0, b, n, d, N, D, SEEDED, WHOLE, ACC)
        start = rounded(point + tl.sqrt(variance) * xi, x0_out.dtype.element_ty)
        tl.store(x0_out + at, start, mask=inside)
        point = start.to(tl.float64)
        tl.store(shift0_out + at, rounded(start_mean - (point - origin), shift0_out.dtype.element_ty), mask=inside)
    point -= origin
    for k in range(steps):
        xi = noise_tile(noise, noise_k, noise_n, noise_d, seed, CHAIN, k, k + PASS, b, n, d, N, D, SEEDED, WHOLE, ACC)
        point = point - pull * point + spread * xi
    end = rounded(point + drift + origin, xt_out.dtype.element_ty)
    tl.store(xt_out + at, end, mask=inside)
    if PASS:
        shift = end_mean - (end.to(tl.float64) - origin)
        tl.store(shift_t_out + at, rounded(shift, shift_t_out.dtype.element_ty), mask=inside)
