"""Langevin dynamics of a learned field at one noise level (Sec. 2.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxkernels.checks import check_finite, check_num_steps, check_positive, check_tensor
from fluxmatching.fields import Field, call_field

Callback = Callable[[int, Tensor], None]  # called as callback(k, x) after update k = 1, 2, ...


def unadjusted_langevin(
    field: Field,
    x: Tensor,
    *,
    step_size: float,
    num_steps: int,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Run unadjusted Langevin dynamics, x ← x + η f(x) + √(2η) ξ (Sec. 2.1).

    Converges to the field's stationary distribution as η → 0 and the number of updates grows.

    Args:
        field: f, maps `[N, *event]` to the same shape.
        x: starts, `[N, *event]`.
        step_size: η > 0, in squared units of x.
        num_steps: number of updates.
        generator: makes the noise, on the device of x; None uses torch's own.
        callback: called as `callback(k, x)` after update k = 1 … num_steps.

    Returns:
        `[N, *event]`.
    """
    function = "unadjusted_langevin"
    check_samples(function, x)
    check_num_steps(function, num_steps)
    step_size = check_positive(function, "step_size", step_size)
    with torch.no_grad():
        for k in range(1, num_steps + 1):
            x = x + step_size * call_field(field, x) + math.sqrt(2 * step_size) * noise_like(x, generator)
            if callback is not None:
                callback(k, x)
    return x


def check_samples(function: str, x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError unless x is a finite `[N, *event]`."""
    check_tensor(function, name, x)
    if x.ndim < 2:
        raise ValueError(f"{function}: {name} must have shape [N, *event], got {list(x.shape)}")
    check_finite(function, **{name: x})


def check_generator(generator: object) -> None:
    """Raise TypeError unless `generator` is a generator of random numbers, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, such as torch.Generator(x.device).manual_seed(0), got {generator!r}"
        )


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise of the shape, dtype and device of x."""
    check_generator(generator)
    # PyTorch cannot trace the variant with a generator for symbolic sizes.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.randn(x.shape, **source, dtype=x.dtype, device=x.device)
