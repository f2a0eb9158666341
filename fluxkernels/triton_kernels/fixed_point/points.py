"""Points as fixed-point words, relative to an origin: the first reference point of their group.

`extent_kernel` finds the scales, `points_kernel` converts. Both work per coordinate, in float64, and are bound by
memory.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.differences import load_refs, load_row, load_tile
from fluxkernels.triton_kernels.fixed_point.numbers import (
    LOWEST,
    digits,
    exponent_above,
    is_finite,
    largest,
    nearest_word,
    power_of_two,
)
from fluxkernels.triton_kernels.scalars import one_minus_exp


@triton.jit
def centered(value, rows, count, origin):
    """`value` relative to the origin; zero for rows that do not exist."""
    return tl.where((rows < count)[:, None], value - origin[None, :], 0.0)


@triton.jit
def pull_of(tau, MOVED: tl.constexpr):
    """1-e^{-τ} of a transition, or 0."""
    pull = tl.zeros([], tl.float64)
    if MOVED:
        pull = one_minus_exp(tl.load(tau).to(tl.float64))
    return pull


@triton.jit
def finite_extent(top, value):
    """Largest of `top` and of the finite magnitudes of `value`, as float32."""
    size = tl.abs(value).to(tl.float32)
    return tl.maximum(top, tl.where(is_finite(size), size, 0.0))


@triton.jit
def extent_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, move, m_b, m_m, m_d, tau, a_b,
    extents,
    N, M, D, parts,
    CENTERED: tl.constexpr, MOVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maxima `[B, 2, parts]` of the coordinates of queries and of reference points about the origin.

    A program takes ROWS of every parts·ROWS. Without CENTERED, the queries are vectors, which have no origin.
    """
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    x += b * x_b
    refs += b * r_b
    move += b * m_b
    pull = pull_of(tau + b * a_b, MOVED)
    of_x = tl.zeros([ROWS, BLOCK], tl.float32)
    of_refs = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        origin = load_row(refs, d, r_d, D)
        for first in range(part * ROWS, N, parts * ROWS):
            n = first + tl.arange(0, ROWS)
            value = load_tile(x, n, x_n, N, d, x_d, D)
            if CENTERED:
                value = centered(value, n, N, origin)
            of_x = finite_extent(of_x, value)
        for first in range(part * ROWS, M, parts * ROWS):
            j = first + tl.arange(0, ROWS)
            value = load_refs(refs, r_m, r_d, move, m_m, m_d, pull, j, M, d, D, MOVED)
            of_refs = finite_extent(of_refs, centered(value, j, M, origin))
    tl.store(extents + 2 * b * parts + part, tl.max(tl.max(of_x, 1), 0))
    tl.store(extents + (2 * b + 1) * parts + part, tl.max(tl.max(of_refs, 1), 0))


@triton.jit
def store_words(out, rows, count, d, width, value, e):
    """Store values as words of 2^e in rows of `width`, and return word² as float64."""
    word = nearest_word(tl.where(is_finite(value), value, 0.0) * power_of_two(30 - e))
    at = rows.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out + at, digits(word), mask=(rows < count)[:, None] & (d < width)[None, :])
    square = word.to(tl.float64)
    return square * square


@triton.jit
def points_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, move, m_b, m_m, m_d, tau, a_b,
    extents, parts,
    left, right, exponents, halves, valid,
    N, M, D, width,
    CENTERED: tl.constexpr, MOVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS queries or reference points per program: words `left` `[B, N, width]` or `right` `[B, M, width]`.

    `exponents` `[B, 2]` are those of queries and reference points. `halves` `[B, M]` are the |r|²/2 in units of the
    products of queries and reference points, or -LOWEST for a reference point that is not finite. `valid` `[B, N]` is
    0, or NaN for a query that is not finite.
    """
    blocks_x = tl.cdiv(N, ROWS)
    blocks = blocks_x + tl.cdiv(M, ROWS)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    extents += 2 * b * parts
    e_refs = exponent_above(largest(extents + parts, parts, 128))
    e_x = exponent_above(largest(extents, parts, 128))
    if CENTERED:  # |r|² fits then in units of the products
        e_x = tl.maximum(e_x, e_refs)
    x += b * x_b
    refs += b * r_b
    move += b * m_b
    pull = pull_of(tau + b * a_b, MOVED)
    bad = tl.zeros([ROWS, BLOCK], tl.float32)
    square = tl.zeros([ROWS, BLOCK], tl.float64)
    if block < blocks_x:
        n = block * ROWS + tl.arange(0, ROWS)
        for start in range(0, width, BLOCK):
            d = start + tl.arange(0, BLOCK)
            value = load_tile(x, n, x_n, N, d, x_d, D)
            if CENTERED:
                value = centered(value, n, N, load_row(refs, d, r_d, D))
            store_words(left + b * N * width, n, N, d, width, value, e_x)
            bad += (value * 0).to(tl.float32)
        tl.store(valid + b * N + n, tl.sum(bad, 1), mask=n < N)
    else:
        j = (block - blocks_x) * ROWS + tl.arange(0, ROWS)
        for start in range(0, width, BLOCK):
            d = start + tl.arange(0, BLOCK)
            value = load_refs(refs, r_m, r_d, move, m_m, m_d, pull, j, M, d, D, MOVED)
            value = centered(value, j, M, load_row(refs, d, r_d, D))
            square += store_words(right + b * M * width, j, M, d, width, value, e_refs)
            bad += (value * 0).to(tl.float32)
        # A word of a reference point counts 2^(e_refs-30), and a unit of products 2^(e_x+e_refs-44).
        half = tl.floor(tl.sum(square, 1) * power_of_two(e_refs - e_x - 17) + 0.5).to(tl.int64)
        tl.store(halves + b * M + j, tl.where(is_finite(tl.sum(bad, 1)), half, -LOWEST), mask=j < M)
    if block == 0:
        tl.store(exponents + 2 * b, e_x)
        tl.store(exponents + 2 * b + 1, e_refs)


@triton.jit
def columns_kernel(right, columns, M, width, length, TILE: tl.constexpr):
    """Words `right` `[B, M, width]` of reference points by columns, `[B, width, length]`, with zeros after M."""
    tiles_j, tiles_d = tl.cdiv(length, TILE), tl.cdiv(width, TILE)
    tile = tl.program_id(0) % (tiles_j * tiles_d)
    b = (tl.program_id(0) // (tiles_j * tiles_d)).to(tl.int64)
    j = ((tile % tiles_j) * TILE + tl.arange(0, TILE)).to(tl.int64)
    d = ((tile // tiles_j) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (j < M)[:, None] & (d < width)[None, :]
    words = tl.load(right + (b * M + j[:, None]) * width + d[None, :], mask=inside, other=0)
    known = (d < width)[:, None] & (j < length)[None, :]
    tl.store(columns + (b * width + d[:, None]) * length + j[None, :], tl.trans(words), mask=known)
