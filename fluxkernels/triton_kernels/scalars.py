"""Functions of numbers that kernels of both kinds use."""

import triton
import triton.language as tl


@triton.jit
def one_minus_exp(h):
    """1 - e^{-h} for h ≥ 0, to rounding: the error of e^{-h} cancels against that of its logarithm (Kahan)."""
    u = tl.exp(-h)
    return tl.where(u == 1, h, tl.where(u < 0.5, 1 - u, (1 - u) * h / -tl.log(tl.where((u == 1) | (u == 0), 0.5, u))))


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """A float64 as TYPE; to half precision by way of float32, from where there are conversions everywhere."""
    if TYPE == tl.float64:
        result = value
    else:
        result = value.to(tl.float32).to(TYPE)
    return result
