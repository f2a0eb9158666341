"""Exponential Langevin chain (Eq. 8) in few dimensions: a whole chain in the registers of one program."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.philox import CHAIN, START, normal_rows
from fluxkernels.triton_kernels.scalars import HALF_LOG2_E, step_sizes
from fluxkernels.triton_kernels.streaming.tiles import load_points, place, store_points, sweep


@triton.jit
def langevin_kernel(
    x_in, x_b, x_n, x_d, refs, r_b, sigma2, s_b, tau, a_b,
    seed, noise, noise_k, noise_b, noise_n, noise_d,
    x0_out, shift0_out, xt_out, shift_t_out,
    N, M, steps,
    D: tl.constexpr, ACC: tl.constexpr, PASS: tl.constexpr, SEEDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """x <- x + (1-e^{-h}) (m(x) - x) + σ √(1-e^{-2h}) ξ_k with h = τ/steps, `steps` times; sigma2 and tau `[B]`.

    With PASS, the chain starts from x + σ n0. This start, and m - x at the start and end, are stored too.
    """
    b, n, inside, lane = place(N, COLUMNS, LANES)
    written = inside & (lane == 0)
    row = b * N + n
    variance = tl.load(sigma2 + b * s_b).to(ACC)
    pull, spread = step_sizes(variance, tl.load(tau + b * a_b).to(ACC), steps)
    scale = tl.zeros([COLUMNS * LANES], ACC) + HALF_LOG2_E / variance
    base = refs + b * r_b
    noise_at = noise + b * noise_b
    if SEEDED:
        key = tl.load(seed)
    x = load_points(x_in + b * x_b, n * x_n, x_d, inside, D, ACC)
    shift = ()
    for _ in tl.static_range(D):
        shift = shift + (tl.zeros(x[0].shape, ACC),)
    # A pass begins with a step of noise alone, and computes the mean after each step; a chain computes it before.
    for k in range(steps + PASS):
        if not PASS:
            _nearest, _total, shift = sweep(x, lane, scale, base, base, 0.0, M, D, ROWS, LANES, True, False)
        stream, step, size = CHAIN, k, spread
        if PASS:
            stream, step = tl.where(k == 0, START, CHAIN), tl.where(k == 0, 0, k - 1)
            size = tl.where(k == 0, tl.sqrt(variance), spread)
        if SEEDED:
            xi = normal_rows(key, stream, step, row, D, ACC)
        else:
            at = (tl.zeros([], tl.int64) + k) * noise_k + n * noise_n
            xi = load_points(noise_at, at, noise_d, inside, D, ACC)
        moved = ()
        for d in tl.static_range(D):
            to = x[d] + pull * shift[d] + size * xi[d]
            if PASS:  # the chain starts from the rounded x0, and the mean at its end is that of the rounded x_τ
                to = tl.where((k == 0) | (k == steps), to.to(x0_out.dtype.element_ty).to(ACC), to)
            moved = moved + (to,)
        x = moved
        if PASS:
            _nearest, _total, shift = sweep(x, lane, scale, base, base, 0.0, M, D, ROWS, LANES, True, False)
            if k == 0:
                store_points(x0_out, row * D, 1, x, written, D)
                store_points(shift0_out, row * D, 1, shift, written, D)
    store_points(xt_out, row * D, 1, x, written, D)
    if PASS:
        store_points(shift_t_out, row * D, 1, shift, written, D)
