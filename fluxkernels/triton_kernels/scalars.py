"""Functions of numbers that kernels of all packages use."""

# Names inside a kernel have Triton's types, which mypy does not know.
# mypy: ignore-errors
import triton
import triton.language as tl

HALF_LOG2_E = tl.constexpr(0.7213475204444817)  # the hardware computes powers of two


@triton.jit
def one_minus_exp(h):
    """1 - e^{-h} for h ≥ 0, up to rounding: the error of e^{-h} cancels with that of its logarithm (Kahan)."""
    u = tl.exp(-h)
    return tl.where(u == 1, h, tl.where(u < 0.5, 1 - u, (1 - u) * h / -tl.log(tl.where((u == 1) | (u == 0), 0.5, u))))


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """Convert a float64 to TYPE; to half precision through float32, because every GPU has those conversions."""
    if TYPE == tl.float64:
        result = value
    else:
        result = value.to(tl.float32).to(TYPE)
    return result


@triton.jit
def step_sizes(variance, tau, steps):
    """(1-e^{-h}, σ√(1-e^{-2h})) with h = τ/steps: the coefficients of an exponential Langevin step."""
    h = tau / steps
    return one_minus_exp(h), tl.sqrt(variance * one_minus_exp(2 * h))


@triton.jit
def normalized_log_density(total, least, variance, M, D):
    """log p̂ from the total of M weights, each relative to the weight of the least distance."""
    count = tl.zeros([], total.dtype) + M
    return tl.log(total) - tl.log(count) - 0.5 * (least / variance + D * (tl.log(variance) + 1.8378770664093453))
