"""Common parts of the kernels for few dimensions: reference points stream past queries.

A program holds COLUMNS queries in each of LANES lanes, as vectors of COLUMNS·LANES numbers; coordinates are a tuple of
D vectors, and a tile of ROWS reference points per lane is a tuple of ROWS·D vectors. With a vector instead of a matrix
per number, every release of Triton gives a thread whole queries, so that sums over reference points stay inside of it.
Lanes share the reference points; their sums are combined after a sweep. Whole tiles come first and need no mask, then
the remaining reference points one per lane. Distances are sums of squared differences of raw coordinates, and means are
sums of weighted differences: nothing cancels, and no origin is needed.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

# Logit of a point that does not exist: its weight is 0 in float32 and float64, and products with the logit are finite.
NO_LOGIT = tl.constexpr(-1e4)


@triton.jit
def place(count, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """(group, entries, mask of those that exist, lanes) of this program, if each group has `count` entries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(count, COLUMNS)
    column = tl.arange(0, COLUMNS * LANES)
    entries = (program % blocks).to(tl.int64) * COLUMNS + column % COLUMNS
    return (program // blocks).to(tl.int64), entries, entries < count, column // COLUMNS


@triton.jit
def over_lanes(t, LANES: tl.constexpr):
    """Sum over lanes, returned in every lane."""
    if LANES > 1:
        parts = tl.reshape(t, [LANES, t.shape[0] // LANES])
        t = tl.reshape(tl.broadcast_to(tl.sum(parts, 0)[None, :], parts.shape), t.shape)
    return t


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    """Tuple of COUNT zero vectors."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros(like.shape, like.dtype),)
    return out


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
def load_tile(pointer, COUNT: tl.constexpr, ACC: tl.constexpr):
    """COUNT adjacent numbers from each pointer of a vector, as a tuple: with four per load if they come in fours."""
    VECTORS: tl.constexpr = COUNT // 4 if COUNT % 4 == 0 else 0
    out = ()
    for k in tl.static_range(VECTORS):
        four = tl.load((pointer + 4 * k)[:, None] + tl.arange(0, 4)[None, :]).to(ACC)
        even, odd = tl.split(tl.reshape(four, [pointer.shape[0], 2, 2]))
        n0, n2 = tl.split(even)
        n1, n3 = tl.split(odd)
        out = out + (n0, n1, n2, n3)
    for k in tl.static_range(4 * VECTORS, COUNT):
        out = out + (tl.load(pointer + k).to(ACC),)
    return out


@triton.jit
def far(ACC: tl.constexpr):
    """Distance of a reference point that does not exist: its weight is 0; finite, since a lane may have no others."""
    return tl.full([], 1e308 if ACC == tl.float64 else 3e38, ACC)


# Multiply-adds of distances are fused by name: every kernel then finds the same distance of a pair, to the last bit.
@triton.jit
def displacement(x, points, k, D: tl.constexpr):
    """(r - x as a tuple, |r - x|²) for entry k of a tuple of coordinates."""
    out = ()
    square = 0.0
    for d in tl.static_range(D):
        e = points[k * D + d] - x[d]
        out = out + (e,)
        square = e * e if d == 0 else tl.fma(e, e, square)
    return out, square


@triton.jit
def moved_displacement(x, points, moves, pull, k, D: tl.constexpr):
    """`displacement` from reference points r + pull·move, whose sum would round digits off r."""
    out = ()
    square = 0.0
    for d in tl.static_range(D):
        e = tl.fma(pull, moves[k * D + d], points[k * D + d] - x[d])
        out = out + (e,)
        square = e * e if d == 0 else tl.fma(e, e, square)
    return out, square


@triton.jit
def weight(a, nearest, scale):
    """exp(-a/2σ²) relative to that of the least squared distance, exactly 1 for the least.

    The difference comes first: a·scale - nearest·scale in one fused multiply-add would leave the rounding of the second
    product, which is of any size for far queries, and the weight would be 0 or infinite.
    """
    return tl.exp2((nearest - a) * scale)


@triton.jit
def add_tile(
    nearest, total, shift, x, scale, points, moves, pull, inside,
    D: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Add the ROWS reference points of a tile, or those `inside`, to the softmax (nearest, total, shift) of `sweep`."""
    e = ()
    a = ()
    for k in tl.static_range(ROWS):
        if MOVED:
            difference, square = moved_displacement(x, points, moves, pull, k, D)
        else:
            difference, square = displacement(x, points, k, D)
        e = e + difference
        a = a + (tl.where(inside, square, far(x[0].dtype)),)
    least = a[0]
    for k in tl.static_range(1, ROWS):
        least = tl.minimum(least, a[k])
    lower = tl.minimum(nearest, least)
    keep = tl.exp2((lower - nearest) * scale)
    total = total * keep
    if MEAN:
        kept = ()
        for d in tl.static_range(D):
            kept = kept + (shift[d] * keep,)
        shift = kept
    for k in tl.static_range(ROWS):
        w = weight(a[k], lower, scale)
        total += w
        if MEAN:
            added = ()
            for d in tl.static_range(D):
                added = added + (shift[d] + w * e[k * D + d],)
            shift = added
    return lower, total, shift


@triton.jit
def sweep(
    x, lane, scale, refs, move, pull, M,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MEAN: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Online softmax of the logits -|x - r_j|² scale log 2 over all reference points `[M, D]`.

    Returns (least squared distance; total of the weights relative to its own; m - x or zeros). `scale` is log₂e/2σ²:
    the hardware computes powers of two. With MOVED, the reference points are r + pull·move instead.
    """
    ACC: tl.constexpr = x[0].dtype
    nearest = tl.zeros(x[0].shape, ACC) + far(ACC)
    total = tl.zeros(x[0].shape, ACC)
    shift = zeros(x[0], D if MEAN else 0)
    at = refs + lane * (ROWS * D)
    at_move = move + lane * (ROWS * D)
    whole = M // (ROWS * LANES)
    for _ in range(whole):
        points = load_tile(at, ROWS * D, ACC)
        moves = points
        if MOVED:
            moves = load_tile(at_move, ROWS * D, ACC)
        at += ROWS * LANES * D
        at_move += ROWS * LANES * D
        nearest, total, shift = add_tile(
            nearest, total, shift, x, scale, points, moves, pull, True, D, ROWS, MEAN, MOVED
        )
    for start in range(whole * (ROWS * LANES), M, LANES):
        inside = start + lane < M
        index = (start + lane).to(tl.int64) * D
        points = load_points(refs, index, 1, inside, D, ACC)
        moves = points
        if MOVED:
            moves = load_points(move, index, 1, inside, D, ACC)
        nearest, total, shift = add_tile(
            nearest, total, shift, x, scale, points, moves, pull, inside, D, 1, MEAN, MOVED
        )
    if LANES > 1:
        lanes = tl.reshape(nearest, [LANES, nearest.shape[0] // LANES])
        lower = tl.reshape(tl.broadcast_to(tl.min(lanes, 0)[None, :], lanes.shape), nearest.shape)
        keep = tl.exp2((lower - nearest) * scale)
        nearest, total = lower, over_lanes(total * keep, LANES)
        if MEAN:
            kept = ()
            for d in tl.static_range(D):
                kept = kept + (over_lanes(shift[d] * keep, LANES),)
            shift = kept
    if MEAN:
        mean = ()
        for d in tl.static_range(D):
            mean = mean + (shift[d] / total,)
        shift = mean
    return nearest, total, shift
