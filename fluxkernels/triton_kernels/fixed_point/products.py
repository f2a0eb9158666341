"""The one matrix product of this package: exact sums of products of fixed-point words, on the matrix units."""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import triton
import triton.language as tl

from fluxkernels.triton_kernels.fixed_point.numbers import add_products, total_of


@triton.jit
def products_kernel(
    left, l_b, l_r, l_k, right, r_b, r_c, r_k,
    products,
    rows, columns, length, span, splits,
    LEFT_ACROSS: tl.constexpr, RIGHT_ACROSS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ_k left[r, k] right[c, k] as `[B, rows, columns]`, in units of 2^(e+e'-44).

    ACROSS: k is the row of the stored array, whose rows are then padded to whole tiles; else k is its column, and
    padded with zeros to a multiple of DEPTH. A program sums `span` of the `length` terms. With SPLIT, it adds its sum
    to `products`, which is zero before.
    """
    program = tl.program_id(0)
    tiles_r, tiles_c = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    r = (program % tiles_r) * ROWS + tl.arange(0, ROWS)
    c = (program // tiles_r % tiles_c) * COLUMNS + tl.arange(0, COLUMNS)
    part = program // (tiles_r * tiles_c)
    split, b = part % splits, (part // splits).to(tl.int64)
    # Rows that do not exist repeat the last one: loads need no mask.
    at_r = r.to(tl.int64) if LEFT_ACROSS else tl.minimum(r, rows - 1).to(tl.int64)
    at_c = c.to(tl.int64) if RIGHT_ACROSS else tl.minimum(c, columns - 1).to(tl.int64)
    left += b * l_b + at_r[:, None] * l_r
    right += b * r_b + at_c[None, :] * r_c
    s0 = tl.zeros([ROWS, COLUMNS], tl.int32)
    s1 = tl.zeros([ROWS, COLUMNS], tl.int32)
    s2 = tl.zeros([ROWS, COLUMNS], tl.int32)
    s3 = tl.zeros([ROWS, COLUMNS], tl.int32)
    s4 = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(split * span, tl.minimum((split + 1) * span, length), DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        if LEFT_ACROSS:
            a = tl.load(left + k[None, :] * l_k, mask=k[None, :] < length, other=0)
        else:
            a = tl.load(left + k[None, :] * l_k)
        if RIGHT_ACROSS:  # where `left` is zero
            w = tl.load(right + tl.minimum(k, length - 1)[:, None] * r_k)
        else:
            w = tl.load(right + k[:, None] * r_k)
        s0, s1, s2, s3, s4 = add_products(a, w, s0, s1, s2, s3, s4)
    out = products + (b * rows + r[:, None].to(tl.int64)) * columns + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    total = total_of(s0, s1, s2, s3, s4)
    if SPLIT:
        tl.atomic_add(out, total, mask=inside, sem="relaxed")
    else:
        tl.store(out, total, mask=inside)
