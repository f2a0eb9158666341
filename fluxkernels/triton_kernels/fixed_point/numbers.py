"""Fixed-point numbers: 31-bit words, their products in four balanced digits, and scales that are powers of two.

A word q stands for q·2^(e-30), where 2^e exceeds every number of its array. Words are cut into four digits of 8 bits,
whose products and sums the matrix units compute exactly in integers. A sum of products of words is an int64 T that
stands for T·2^(e+e'-44): digits that count less than a unit of T are left out. Since integers are exact, results do not
depend on the order of sums, on splits or on the GPU, and differences of sums lose nothing to cancellation.
"""

# Names inside a kernel have Triton's types, which mypy does not know.
# mypy: ignore-errors
import triton
import triton.language as tl

ONE = tl.constexpr(2**30)  # the word of 2^e
LOWEST = tl.constexpr(-(2**62))  # below every sum of products


@triton.jit
def as_long(number):
    """An int64, also of an int that is known when a kernel is compiled."""
    return tl.zeros([], tl.int64) + number


@triton.jit
def power_of_two(e):
    """2^e as a float64."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power_of_two_single(e):
    """2^e as a float32, for -126 ≤ e ≤ 127."""
    return ((e.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_above(number):
    """Least e with |number| < 2^e, for a finite float32."""
    return ((number.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23) - 126


@triton.jit
def nearest_word(number):
    """Convert to the nearest integer, which fits in a word."""
    return tl.floor(number + 0.5).to(tl.int32)


@triton.jit
def is_finite(value):
    """False for infinities and NaN.

    The usual test, value - value, is not one here: of a product, a fused multiply-add makes it the product's rounding
    error.
    """
    return tl.abs(value) < float("inf")


@triton.jit
def largest(partial, parts, BLOCK: tl.constexpr):
    """Largest of the partial maxima of a group."""
    top = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(partial + at, mask=at < parts, other=0.0))
    return tl.max(top, 0)


@triton.jit
def sum_of(partial, parts, BLOCK: tl.constexpr):
    """Sum of the partial sums of a group."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < parts, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_products(left, right, s0, s1, s2, s3, s4):
    """Add the products of two tiles of words to sums of products of digits, one sum per power of 2^-8."""
    a0, a1, a2, a3 = (left >> 24).to(tl.int8), (left >> 16).to(tl.int8), (left >> 8).to(tl.int8), left.to(tl.int8)
    b0, b1, b2, b3 = (right >> 24).to(tl.int8), (right >> 16).to(tl.int8), (right >> 8).to(tl.int8), right.to(tl.int8)
    s0 = tl.dot(a0, b0, s0, out_dtype=tl.int32)
    s1 = tl.dot(a0, b1, s1, out_dtype=tl.int32)
    s1 = tl.dot(a1, b0, s1, out_dtype=tl.int32)
    s2 = tl.dot(a0, b2, s2, out_dtype=tl.int32)
    s2 = tl.dot(a1, b1, s2, out_dtype=tl.int32)
    s2 = tl.dot(a2, b0, s2, out_dtype=tl.int32)
    s3 = tl.dot(a0, b3, s3, out_dtype=tl.int32)
    s3 = tl.dot(a1, b2, s3, out_dtype=tl.int32)
    s3 = tl.dot(a2, b1, s3, out_dtype=tl.int32)
    s3 = tl.dot(a3, b0, s3, out_dtype=tl.int32)
    s4 = tl.dot(a1, b3, s4, out_dtype=tl.int32)
    s4 = tl.dot(a2, b2, s4, out_dtype=tl.int32)
    s4 = tl.dot(a3, b1, s4, out_dtype=tl.int32)
    return s0, s1, s2, s3, s4


@triton.jit
def digits(word):
    """A word whose four bytes, as signed integers, are its balanced digits: word = Σ digit_i 2^(24 - 8i)."""
    return (word + 0x00808080) ^ 0x00808080


@triton.jit
def word_of(four):
    """The word that has these digits."""
    return (four ^ 0x00808080) - 0x00808080


@triton.jit
def total_of(s0, s1, s2, s3, s4):
    """The int64 that the sums of products of digits stand for."""
    high = (s0.to(tl.int64) << 32) + (s1.to(tl.int64) << 24) + (s2.to(tl.int64) << 16)
    return high + (s3.to(tl.int64) << 8) + s4.to(tl.int64)
