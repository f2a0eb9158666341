"""Normal numbers of `fluxkernels.philox`, made inside of a kernel."""

# Names inside a kernel have Triton's types, which mypy does not know.
# mypy: ignore-errors
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxkernels.triton_kernels.launch import launch, on_device_of

CHAIN = tl.constexpr(0)  # streams, as in fluxkernels.philox
START = tl.constexpr(1)


@triton.jit
def cosine_and_sine(angle, ACC: tl.constexpr):
    """Taylor series on [-π/4, π/4]: the hardware is not accurate enough, and the library slower than this."""
    square = angle * angle
    if ACC == tl.float64:
        s = square * (-1.0 / 1307674368000) + 1.0 / 6227020800
        s = s * square - 1.0 / 39916800
        s = s * square + 1.0 / 362880
        c = square * (1.0 / 20922789888000) - 1.0 / 87178291200
        c = c * square + 1.0 / 479001600
        c = c * square - 1.0 / 3628800
        c = c * square + 1.0 / 40320
    else:  # the omitted terms are below 4e-9
        s = tl.full(angle.shape, 1.0 / 362880, ACC)
        c = tl.full(angle.shape, 1.0 / 40320, ACC)
    s = s * square - 1.0 / 5040
    s = s * square + 1.0 / 120
    s = s * square - 1.0 / 6
    c = c * square - 1.0 / 720
    c = c * square + 1.0 / 24
    c = c * square - 0.5
    return c * square + 1, s * square * angle + angle


@triton.jit
def box_muller(a, b, ACC: tl.constexpr):
    """Two normal numbers from two words: radius of u = (a + ½)/2³², angle 2πb/2³²."""
    UNIT: tl.constexpr = 2.3283064365386963e-10  # 2⁻³²
    lower = (a.to(ACC) + 0.5) * UNIT
    upper = ((0xFFFFFFFF - a).to(ACC) + 0.5) * UNIT
    # log(1 - upper) from the logarithm of the rounded 1 - upper, corrected for that rounding.
    rest = 1 - upper
    near_one = tl.where(rest == 1, -upper, tl.log(rest) * (upper / tl.where(rest == 1, 1, 1 - rest)))
    log_u = tl.where(a < 0x80000000, tl.log(lower), near_one)
    radius = tl.sqrt(-2 * log_u)
    # Whole quarter turns are removed exactly, so that the angle keeps its digits.
    shifted = b + 0x20000000
    quarter = shifted >> 30
    angle = ((shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(ACC) * 1.4629180792671596e-09  # 2π/2³²
    c, s = cosine_and_sine(angle, ACC)
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    sine = tl.where(quarter >= 2, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def block_of(seed, stream, step, block):
    """The four words of a block of Philox."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, (tl.zeros_like(low) + step).to(tl.uint32), tl.zeros_like(low) + stream)


@triton.jit
def normal_at(seed, stream, step, element, ACC: tl.constexpr):
    """One standard normal number per element of a step."""
    w0, w1, w2, w3 = block_of(seed, stream, step, element >> 2)
    second = (element & 2) != 0
    n0, n1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), ACC)
    return tl.where((element & 1) != 0, n1, n0)


@triton.jit
def normal_rows(seed, stream, step, rows, D: tl.constexpr, ACC: tl.constexpr):
    """Standard normal numbers for the elements rows·D, ..., rows·D + D - 1 of a step: a tuple of D tensors like `rows`.

    A block of Philox makes four numbers, two from each pair of words.
    """
    first = rows * D
    out = ()
    if D == 1:
        out = out + (normal_at(seed, stream, step, first, ACC),)
    elif D % 2 == 0:  # a row starts at the beginning of a block or in its middle
        for d in tl.static_range(0, D, 4 if D % 4 == 0 else 2):
            w0, w1, w2, w3 = block_of(seed, stream, step, (first + d) >> 2)
            if D % 4 == 0:
                n0, n1 = box_muller(w0, w1, ACC)
                n2, n3 = box_muller(w2, w3, ACC)
                out = out + (n0, n1, n2, n3)
            else:
                second = ((first + d) & 2) != 0
                out = out + box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), ACC)
    else:  # a row starts anywhere: make all blocks that it can touch, and select from its place in the first
        numbers = ()
        for k in tl.static_range((D + 6) // 4):
            w0, w1, w2, w3 = block_of(seed, stream, step, (first >> 2) + k)
            n0, n1 = box_muller(w0, w1, ACC)
            n2, n3 = box_muller(w2, w3, ACC)
            numbers = numbers + (n0, n1, n2, n3)
        place = first & 3
        for d in tl.static_range(D):
            late = tl.where(place == 2, numbers[d + 2], numbers[d + 3])
            out = out + (tl.where(place == 0, numbers[d], tl.where(place == 1, numbers[d + 1], late)),)
    return out


@triton.jit
def normal_tile(seed, stream, step, rows, columns, D, WHOLE: tl.constexpr, ACC: tl.constexpr):
    """Standard normal numbers for the elements rows·D + columns of a step, `[rows, columns]`.

    WHOLE requires D and the first of the adjacent columns to be multiples of four; it uses whole blocks of Philox.
    """
    if WHOLE:
        quarter: tl.constexpr = columns.shape[0] // 4
        first = tl.min(columns, 0) + 4 * tl.arange(0, quarter)
        w0, w1, w2, w3 = block_of(seed, stream, step, (rows.to(tl.int64)[:, None] * D + first[None, :]) >> 2)
        n0, n1 = box_muller(w0, w1, ACC)
        n2, n3 = box_muller(w2, w3, ACC)
        value = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [rows.shape[0], columns.shape[0]])
    else:
        element = rows.to(tl.int64)[:, None] * D + columns[None, :]
        value = normal_at(seed, stream, step, element, ACC)
    return value


@triton.jit
def normal_kernel(seed, out, elements, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Write out[step, e] for all steps (second axis of the grid)."""
    step = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = normal_at(tl.load(seed), STREAM, step, e, out.dtype.element_ty)
    tl.store(out + step * elements + e, value, mask=e < elements)


def normal(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """`fluxkernels.philox.normal`."""
    numbers = torch.empty(shape, dtype=dtype, device=seed.device)
    elements, block = math.prod(shape[1:]), 1024
    with on_device_of(seed):
        launch(normal_kernel, (-(-elements // block), shape[0]), seed, numbers, elements, STREAM=stream, BLOCK=block)
    return numbers
