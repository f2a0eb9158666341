"""What the kernels for few dimensions share: queries in columns, centres streamed past them tile by tile.

A program holds COLUMNS queries, one a column of its tiles `[ROWS, COLUMNS]`, and their coordinates as a tuple of D
vectors. Triton gives a thread whole columns, so sums over centres stay inside of a thread. Distances are sums of
squared differences of raw coordinates, means sums of weighted differences: nothing cancels, no origin is needed.
"""

import triton
import triton.language as tl


@triton.jit
def place(count, COLUMNS: tl.constexpr):
    """(group, entries, whether they exist) of this program, where groups have `count` entries each."""
    program = tl.program_id(0)
    blocks = tl.cdiv(count, COLUMNS)
    entries = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return (program // blocks).to(tl.int64), entries, entries < count


@triton.jit
def load_points(pointer, at, stride_d, inside, D: tl.constexpr, ACC: tl.constexpr):
    """The D coordinates of the points at offsets `at`, as a tuple."""
    out = ()
    for d in tl.static_range(D):
        out = out + (tl.load(pointer + at + d * stride_d, mask=inside, other=0.0).to(ACC),)
    return out


@triton.jit
def store_points(pointer, at, stride_d, values, inside, D: tl.constexpr):
    for d in tl.static_range(D):
        tl.store(pointer + at + d * stride_d, values[d].to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def one_minus_exp(h):
    """1 - e^{-h} for h ≥ 0, to rounding: the error of e^{-h} cancels against that of its logarithm (Kahan)."""
    u = tl.exp(-h)
    return tl.where(u == 1, h, tl.where(u < 0.5, 1 - u, (1 - u) * h / -tl.log(tl.where((u == 1) | (u == 0), 0.5, u))))


@triton.jit
def differences(x, refs, move, at, stride_d, move_at, move_d, pull, inside, D: tl.constexpr, MOVED: tl.constexpr):
    """(r - x as a tuple of `[ROWS, COLUMNS]`, |r - x|², infinite for centres that are not `inside`).

    Where MOVED, a centre is r + pull·move instead.
    """
    out = ()
    square = tl.zeros([at.shape[0], x[0].shape[0]], x[0].dtype)
    for d in tl.static_range(D):
        r = tl.load(refs + at + d * stride_d, mask=inside, other=0.0).to(x[0].dtype)
        e = r[:, None] - x[d][None, :]
        if MOVED:
            e += (pull * tl.load(move + move_at + d * move_d, mask=inside, other=0.0).to(x[0].dtype))[:, None]
        square += e * e
        out = out + (e,)
    return out, tl.where(inside[:, None], square, float("inf"))


@triton.jit
def sweep(
    x, scale, refs, stride_m, stride_d, move, move_m, move_d, pull, M,
    D: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Softmax of the logits -|x - r_j|² scale log 2 over all centres, online.

    Returns (least distance, total of the weights relative to it, m - x or zeros). `scale` is log₂e/2σ²: powers of two
    are what the hardware computes.
    """
    ACC: tl.constexpr = x[0].dtype
    least = tl.full(x[0].shape, float("inf"), ACC)
    total = tl.zeros(x[0].shape, ACC)
    shift = ()
    for _ in tl.static_range(D):
        shift = shift + (tl.zeros(x[0].shape, ACC),)
    for start in range(0, M, ROWS):
        j = start + tl.arange(0, ROWS)
        e, a = differences(
            x, refs, move, j.to(tl.int64) * stride_m, stride_d, j.to(tl.int64) * move_m, move_d, pull, j < M, D, MOVED
        )
        lower = tl.minimum(least, tl.min(a, 0))
        keep = tl.exp2((lower - least) * scale)
        w = tl.exp2((lower[None, :] - a) * scale[None, :])
        total = total * keep + tl.sum(w, 0)
        if MEAN:
            moved = ()
            for d in tl.static_range(D):
                moved = moved + (shift[d] * keep + tl.sum(w * e[d], 0),)
            shift = moved
        least = lower
    if MEAN:
        mean = ()
        for d in tl.static_range(D):
            mean = mean + (shift[d] / total,)
        shift = mean
    return least, total, shift
