"""The closed-form part of the residual's gradient, in few dimensions."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import HALF_LOG2_E
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
def residual_kernel(
    z, z_b, z_n, z_d, field, f_b, f_n, f_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n,
    gradient,
    N, M,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Σ_j w_j e_j [e_j·f - a_j/σ²]/σ⁴ - f/σ² + 2(m - z)/σ⁴ with e_j = r_j - m: moments about m, which a first sweep
    computes. Because Σ_j w_j e_j = 0, the least a_j may be subtracted from each, which keeps its digits."""
    b, n, inside, lane = place(N, COLUMNS, LANES)
    x = load_points(z + b * z_b, n * z_n, z_d, inside, D, ACC)
    f = load_points(field + b * f_b, n * f_n, f_d, inside, D, ACC)
    variance = tl.load(sigma2 + b * s_b + n * s_n, mask=inside, other=1.0).to(ACC)
    scale = HALF_LOG2_E / variance
    base = refs + b * r_b
    least, total, step = sweep(x, lane, scale, base, r_m, r_d, refs, 0, 0, 0.0, M, D, ROWS, LANES, True, False)
    moment = ()
    for _ in tl.static_range(D):
        moment = moment + (tl.zeros([COLUMNS * LANES], ACC),)
    for start in range(0, M, ROWS * LANES):
        j = tile_rows(start, lane, ROWS, LANES)
        e, a = differences(x, base, refs, j * r_m, r_d, j, 0, 0.0, j < M, D, False)
        w = tl.exp2((least[None, :] - a) * scale[None, :]) / total[None, :]
        along = tl.zeros([ROWS, COLUMNS * LANES], ACC)
        for d in tl.static_range(D):
            along += (e[d] - step[d][None, :]) * f[d][None, :]
        c = tl.where(w > 0, w * (along - (a - least[None, :]) / variance[None, :]), 0.0)
        summed = ()
        for d in tl.static_range(D):
            summed = summed + (moment[d] + tl.sum(c * (e[d] - step[d][None, :]), 0),)
        moment = summed
    result = ()
    for d in tl.static_range(D):
        result = result + (((over_lanes(moment[d], LANES) + 2 * step[d]) / variance - f[d]) / variance,)
    store_points(gradient, (b * N + n) * D, 1, result, inside & (lane == 0), D)
