"""Inner products of points in many dimensions, and sums of points with given coefficients.

Both run as tiles on the matrix units, in float64: distances from inner products cancel, and no other type leaves enough
digits at every σ. Coordinates are relative to an origin, the first reference point of the group.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.scalars import one_minus_exp, rounded


@triton.jit
def load_tile(pointer, rows, stride_n, columns, stride_d, mask):
    """Load a tile `[rows, columns]` of points as float64."""
    at = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def load_origin(refs, columns, stride_d, D):
    """Coordinates of the first reference point of a group, `[1, columns]`."""
    return tl.load(refs + columns.to(tl.int64) * stride_d, mask=columns < D, other=0.0).to(tl.float64)[None, :]


@triton.jit
def load_centered(pointer, rows, stride_n, columns, stride_d, mask, origin):
    """`load_tile` relative to the origin, and zero outside of the mask."""
    return tl.where(mask, load_tile(pointer, rows, stride_n, columns, stride_d, mask) - origin, 0.0)


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(group, rows, columns) of this program, if each group has a matrix of `rows` times `columns` entries."""
    program = tl.program_id(0)
    tiles_r, tiles_c = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    row = (program % tiles_r) * ROWS + tl.arange(0, ROWS)
    column = (program // tiles_r % tiles_c) * COLUMNS + tl.arange(0, COLUMNS)
    return (program // (tiles_r * tiles_c)).to(tl.int64), row, column


@triton.jit
def products_kernel(
    x, x_b, x_n, x_d, refs, r_b, r_m, r_d, move, m_b, m_m, m_d, tau, a_b,
    products,
    N, M, D, span, splits,
    CENTERED: tl.constexpr, MOVED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Inner products of N queries with M reference points over `span` dimensions: part of `[B, splits, N + 1, M + 1]`.

    With CENTERED, the queries are relative to the origin too, and the last row and column hold the squares of the
    reference points and queries. With MOVED, a reference point is r + (1-e^{-τ})·move: the means of a transition.
    """
    program = tl.program_id(0)
    tiles_n, tiles_m = tl.cdiv(N, ROWS), tl.cdiv(M, COLUMNS)
    n = (program % tiles_n) * ROWS + tl.arange(0, ROWS)
    j = (program // tiles_n % tiles_m) * COLUMNS + tl.arange(0, COLUMNS)
    part = program // (tiles_n * tiles_m)
    split, b = part % splits, (part // splits).to(tl.int64)
    x += b * x_b
    refs += b * r_b
    move += b * m_b
    if MOVED:
        pull = one_minus_exp(tl.load(tau + b * a_b).to(tl.float64))
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    of_queries = tl.zeros([ROWS], tl.float64)
    of_refs = tl.zeros([COLUMNS], tl.float64)
    for start in range(split * span, tl.minimum((split + 1) * span, D), DEPTH):
        d = start + tl.arange(0, DEPTH)
        known = d < D
        origin = load_origin(refs, d, r_d, D)
        inside_n, inside_j = (n < N)[:, None] & known[None, :], (j < M)[:, None] & known[None, :]
        query = load_tile(x, n, x_n, d, x_d, inside_n)
        ref = load_tile(refs, j, r_m, d, r_d, inside_j)
        if MOVED:
            ref += pull * load_tile(move, j, m_m, d, m_d, inside_j)
        ref = tl.where(inside_j, ref - origin, 0.0)
        if CENTERED:
            query = tl.where(inside_n, query - origin, 0.0)
            of_queries += tl.sum(query * query, 1)
            of_refs += tl.sum(ref * ref, 1)
        total = tl.dot(query, tl.trans(ref), total, out_dtype=tl.float64)
    width = tl.zeros([], tl.int64) + M + 1
    products += (b * splits + split) * (N + 1) * width
    tl.store(products + n[:, None] * width + j[None, :], total, mask=(n < N)[:, None] & (j < M)[None, :])
    if CENTERED:  # every program of a row or column writes the same squares
        tl.store(products + n * width + M, of_queries, mask=n < N)
        tl.store(products + N * width + j, of_refs, mask=j < M)


@triton.jit
def combine_kernel(
    coefficients, of_point, of_field,
    x, x_b, x_n, x_d, field, f_b, f_n, f_d, refs, r_b, r_m, r_d,
    out, mean,
    N, M, D,
    KDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ_j c_nj r_j + p_n x_n + f_n field_n, with r and x relative to the origin.

    With KDE, the coefficients are weights, and the results are m - x and m.
    """
    b, n, d = place(N, D, ROWS, COLUMNS)
    refs += b * r_b
    origin = load_origin(refs, d, r_d, D)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, M, DEPTH):
        j = start + tl.arange(0, DEPTH)
        c = load_tile(coefficients + b * N * M, n, M, j, 1, (n < N)[:, None] & (j < M)[None, :])
        inside = (j < M)[:, None] & (d < D)[None, :]
        total = tl.dot(c, load_centered(refs, j, r_m, d, r_d, inside, origin), total, out_dtype=tl.float64)
    inside = (n < N)[:, None] & (d < D)[None, :]
    row = b * N + n
    at = row[:, None] * D + d[None, :]
    point = load_tile(x + b * x_b, n, x_n, d, x_d, inside) - origin
    if KDE:
        tl.store(mean + at, rounded(total + origin, mean.dtype.element_ty), mask=inside)
        total -= point
    else:
        total += tl.load(of_point + row, mask=n < N, other=0.0)[:, None] * point
        along = load_tile(field + b * f_b, n, f_n, d, f_d, inside)
        total += tl.load(of_field + row, mask=n < N, other=0.0)[:, None] * along
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def gather_kernel(
    weights, values, v_b, v_n, v_d, coefficients, x, x_b, x_n, x_d, refs, r_b, r_m, r_d,
    out,
    N, M, V,
    BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add Σ_n w_nj values_n for every reference point j to `out` (float64); with BOTH, add Σ_n c_nj (x_n - r_j) too."""
    b, j, d = place(M, V, ROWS, COLUMNS)
    if BOTH:
        origin = load_origin(refs + b * r_b, d, r_d, V)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    of_ref = tl.zeros([ROWS], tl.float64)
    for start in range(0, N, DEPTH):
        n = start + tl.arange(0, DEPTH)
        inside = (j < M)[:, None] & (n < N)[None, :]
        known = (n < N)[:, None] & (d < V)[None, :]
        w = load_tile(weights + b * N * M, j, 1, n, M, inside)
        total = tl.dot(w, load_tile(values + b * v_b, n, v_n, d, v_d, known), total, out_dtype=tl.float64)
        if BOTH:
            c = load_tile(coefficients + b * N * M, j, 1, n, M, inside)
            point = load_centered(x + b * x_b, n, x_n, d, x_d, known, origin)
            total = tl.dot(c, point, total, out_dtype=tl.float64)
            of_ref += tl.sum(c, 1)
    inside = (j < M)[:, None] & (d < V)[None, :]
    if BOTH:
        total -= of_ref[:, None] * (load_tile(refs + b * r_b, j, r_m, d, r_d, inside) - origin)
    at = (b * M + j)[:, None] * V + d[None, :]
    total += tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)
