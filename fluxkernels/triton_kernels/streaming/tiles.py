"""Common parts of the kernels for few dimensions: queries in columns, tiles of reference points streamed past them.

A program holds COLUMNS queries in each of LANES lanes, as the columns of its tiles `[ROWS, LANES·COLUMNS]`, and their
coordinates as a tuple of D vectors. Each lane handles every LANES-th reference point; sums of lanes are combined after
a sweep. A thread has whole columns, so sums over reference points stay inside of it. Distances are sums of squared
differences of raw coordinates, and means are sums of weighted differences: nothing cancels, and no origin is needed.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl


@triton.jit
def place(count, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """(group, entries, mask of those that exist, lanes) of this program, if each group has `count` entries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(count, COLUMNS)
    column = tl.arange(0, COLUMNS * LANES)
    entries = (program % blocks).to(tl.int64) * COLUMNS + column % COLUMNS
    return (program // blocks).to(tl.int64), entries, entries < count, column // COLUMNS


@triton.jit
def tile_rows(start, lane, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Indices of the reference points of a tile, `[ROWS, LANES·COLUMNS]`."""
    return (start + tl.arange(0, ROWS) * LANES).to(tl.int64)[:, None] + lane.to(tl.int64)[None, :]


@triton.jit
def over_lanes(t, LANES: tl.constexpr):
    """Sum over lanes, returned in every lane."""
    if LANES > 1:
        parts = tl.reshape(t, [LANES, t.shape[0] // LANES])
        t = tl.reshape(tl.broadcast_to(tl.sum(parts, 0)[None, :], parts.shape), t.shape)
    return t


@triton.jit
def load_points(pointer, at, stride_d, inside, D: tl.constexpr, ACC: tl.constexpr):
    """Load the D coordinates of the points at offsets `at`, as a tuple."""
    stride_d = tl.zeros([], tl.int64) + stride_d
    out = ()
    for d in tl.static_range(D):
        out = out + (tl.load(pointer + at + d * stride_d, mask=inside, other=0.0).to(ACC),)
    return out


@triton.jit
def store_points(pointer, at, stride_d, values, inside, D: tl.constexpr):
    for d in tl.static_range(D):
        tl.store(pointer + at + d * stride_d, values[d].to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def far(ACC: tl.constexpr):
    """Distance of a reference point that does not exist: its weight is 0; finite, since a lane may have no others."""
    return 1e308 if ACC == tl.float64 else 3e38


@triton.jit
def differences(x, refs, move, at, stride_d, move_at, move_d, pull, inside, D: tl.constexpr, MOVED: tl.constexpr):
    """(r - x as a tuple of tiles, |r - x|²), with distance `far` for reference points that are not `inside`.

    With MOVED, a reference point is r + pull·move instead.
    """
    stride_d = tl.zeros([], tl.int64) + stride_d
    move_d = tl.zeros([], tl.int64) + move_d
    out = ()
    square = tl.zeros(at.shape, x[0].dtype)
    for d in tl.static_range(D):
        e = tl.load(refs + at + d * stride_d, mask=inside, other=0.0).to(x[0].dtype) - x[d][None, :]
        if MOVED:
            e += pull * tl.load(move + move_at + d * move_d, mask=inside, other=0.0).to(x[0].dtype)
        square += e * e
        out = out + (e,)
    return out, tl.where(inside, square, far(x[0].dtype))


@triton.jit
def sweep(
    x, lane, scale, refs, stride_m, stride_d, move, move_m, move_d, pull, M,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MEAN: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Online softmax of the logits -|x - r_j|² scale log 2 over all reference points.

    Returns (least distance, total of the weights relative to it, m - x or zeros). `scale` is log₂e/2σ²: the hardware
    computes powers of two.
    """
    ACC: tl.constexpr = x[0].dtype
    least = tl.zeros(x[0].shape, ACC) + far(ACC)
    total = tl.zeros(x[0].shape, ACC)
    shift = ()
    for _ in tl.static_range(D):
        shift = shift + (tl.zeros(x[0].shape, ACC),)
    for start in range(0, M, ROWS * LANES):
        j = tile_rows(start, lane, ROWS, LANES)
        e, a = differences(x, refs, move, j * stride_m, stride_d, j * move_m, move_d, pull, j < M, D, MOVED)
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
    keep = total * 0 + 1
    if LANES > 1:
        lanes = tl.reshape(least, [LANES, least.shape[0] // LANES])
        lower = tl.reshape(tl.broadcast_to(tl.min(lanes, 0)[None, :], lanes.shape), least.shape)
        keep = tl.exp2((lower - least) * scale)
        total = over_lanes(total * keep, LANES)
        least = lower
    if MEAN:
        mean = ()
        for d in tl.static_range(D):
            mean = mean + (over_lanes(shift[d] * keep, LANES) / total,)
        shift = mean
    return least, total, shift
