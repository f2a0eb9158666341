"""Counter-based random numbers, equal on every device and backend: Philox 4×32-10.

Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3 (SC 2011). A block of four 32-bit numbers is a
function of a counter and a key alone. Element e of step k of a stream takes number e mod 4 of the block with

    counter = (⌊e/4⌋ mod 2³², ⌊e/4⌋ div 2³², k, stream),   key = (seed mod 2³², seed div 2³²),

where e counts the elements of a contiguous `[..., N, D]`. Different uses of one seed take different streams.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkernels.devices import on_device

CHAIN, START, PROBE, HORIZON, ENDPOINTS, MIXING, NOISE_LEVEL, TIME, LABEL, PARTNER, SOURCE, ORDER, REFERENCE = range(13)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4×32 on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four words, broadcastable.
        key: two words, broadcastable.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, so both halves are right after the copies of the sign bit are masked out.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & LOW, (product1 >> 32) & LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & LOW, high0 ^ c3 ^ k1, product0 & LOW
        k0, k1 = (k0 + _WEYL[0]) & LOW, (k1 + _WEYL[1]) & LOW
    return c0, c1, c2, c3


def bits(seed: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """Words `[steps, blocks, 4]` for `shape` = `[steps, ...]`; the blocks cover the elements of each step."""
    steps, elements = shape[0], math.prod(shape[1:])
    block = torch.arange((elements + 3) // 4, device=seed.device)
    step = torch.arange(steps, device=seed.device).unsqueeze(-1)
    counter = (block & LOW, block >> 32, step, torch.full_like(step, stream))
    return torch.stack(torch.broadcast_tensors(*philox(counter, (seed & LOW, (seed >> 32) & LOW))), dim=-1)


def _to_shape(words: Tensor, shape: Sequence[int]) -> Tensor:
    return words.flatten(1)[:, : math.prod(shape[1:])].reshape(*shape)


def normal(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of shape `[steps, ...]`, by Box and Muller's method from pairs of words.

    Args:
        seed: int64 tensor of shape `[]`; its device is the device of the result.
        shape: `[steps, ...]`.
        stream: CHAIN, START or MIXING, by the use of the numbers.
        dtype: float32 or float64; both give the same numbers up to rounding.
    """
    return _to_shape(normal_from_words(bits(seed, shape, stream), dtype), shape)


def normal_from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Two normal numbers from each pair of the words `[..., 4]`."""
    a, b = words[..., 0::2], words[..., 1::2]
    # -log u for u = (a + ½)/2³², through 1 - u in the upper half, so that float32 keeps its digits at both ends.
    lower = -torch.log((a.to(dtype) + 0.5) * 2.0**-32)
    upper = -torch.log1p(-((LOW - a).to(dtype) + 0.5) * 2.0**-32)
    radius = (2 * torch.where(a < 1 << 31, lower, upper)).sqrt()
    angle = b.to(dtype) * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def uniform_from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the top 23 bits of each word to a number strictly between 0 and 1."""
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def uniform(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers on (0, 1) of shape `[steps, ...]`: (⌊word/2⁹⌋ + ½)/2²³, exact in float32."""
    return _to_shape(uniform_from_words(bits(seed, shape, stream), dtype), shape)


def rademacher(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """Signs ±1 with equal probability, of shape `[steps, ...]`, from the top bit of each word."""
    return _to_shape(1 - 2 * (bits(seed, shape, stream) >> 31), shape).to(dtype)


def as_seed(seed: int | Tensor | None, device: torch.device, name: str = "seed") -> Tensor:
    """Convert `seed` to an int64 tensor of shape `[]`; None draws one from torch's generator of the device.

    Args:
        name: of the argument, for the error message.

    Raises:
        ValueError: a CUDA graph is captured, and the seed is a tensor on another device.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return on_device(name, seed, device, torch.int64)
    # Created on the device: a copy from the host cannot be captured in a CUDA graph.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
