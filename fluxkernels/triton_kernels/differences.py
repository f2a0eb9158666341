"""Coordinates in many dimensions, and squared distances from their differences, in float64."""

# Names inside a kernel have Triton's types, which mypy does not know; functions take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl


@triton.jit
def load_row(pointer, d, stride_d, D):
    """Coordinates d of one point, as float64; zero from D on."""
    return tl.load(pointer + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64)


@triton.jit
def load_tile(pointer, rows, stride_n, count, d, stride_d, D):
    """Coordinates d of some points, `[rows, d]` as float64; zero for rows from `count` and coordinates from D on."""
    at = rows.to(tl.int64)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + at, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)


@triton.jit
def load_refs(refs, r_m, r_d, move, m_m, m_d, pull, rows, M, d, D, MOVED: tl.constexpr):
    """Coordinates d of reference points; with MOVED, of r + pull·move."""
    value = load_tile(refs, rows, r_m, M, d, r_d, D)
    if MOVED:
        value += pull * load_tile(move, rows, m_m, M, d, m_d, D)
    return value


@triton.jit
def squared_distances(x, x_d, refs, r_m, r_d, move, m_m, m_d, pull, j, M, D, MOVED: tl.constexpr, DEPTH: tl.constexpr):
    """|x - r_j|² of one query and a vector of reference points, from differences in float64."""
    total = tl.zeros([j.shape[0], DEPTH], tl.float64)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        ref = load_refs(refs, r_m, r_d, move, m_m, m_d, pull, j, M, d, D, MOVED)
        difference = tl.where((j < M)[:, None], load_row(x, d, x_d, D)[None, :] - ref, 0.0)
        total += difference * difference
    return tl.sum(total, 1)
