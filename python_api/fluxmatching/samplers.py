"""Samplers that take a learned field in place of the score (Sec. 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fluxkernels.checks import check_finite, check_positive, check_steps, check_tensor
from fluxmatching.endpoint import call_field


def unadjusted_langevin(
    field: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Unadjusted Langevin dynamics, x ← x + η f(x) + √(2η) ξ (Sec. 2.1).

    Converges to the field's stationary distribution as η → 0 and the number of steps grows.

    Args:
        field: f, maps `[N, *event]` to the same shape.
        x: starts, `[N, *event]`.
        step: η > 0, in squared units of x.
        steps: number of updates.
        generator: of the noise, on the device of x; None for torch's own.
        callback: called as `callback(k, x)` after update k = 1 … steps.

    Returns:
        `[N, *event]`.
    """
    function = "unadjusted_langevin"
    check_tensor(function, "x", x)
    check_finite(function, x=x)
    check_steps(function, steps)
    step = check_positive(function, "step", step)
    with torch.no_grad():
        for k in range(1, steps + 1):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + step * call_field(field, x) + math.sqrt(2 * step) * noise
            if callback is not None:
                callback(k, x)
    return x


def log_sigma_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """`[steps + 1]` noise levels from sigma_max down to sigma_min, equal ratios, float64 (Algorithm 3)."""
    check_steps("log_sigma_grid", steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got {sigma_min} and {sigma_max}")
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1, dtype=torch.float64).exp()


def reverse_ve(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Reverse variance-exploding diffusion (Song et al. 2021; the predictor of Algorithm 3).

    x ← x + Δ_k f(x, σ_k) + √Δ_k ξ with Δ_k = σ_k² - σ_{k+1}²; the last update adds no noise.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as `log_sigma_grid(K)`.
        generator: of the noise, on the device of x; None for torch's own.
        callback: called as `callback(k, x)` after update k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    function = "reverse_ve"
    check_tensor(function, "x", x)
    check_tensor(function, "sigmas", sigmas)
    check_finite(function, x=x, sigmas=sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not ((sigmas[1:] < sigmas[:-1]).all() and sigmas[-1] >= 0):
        raise ValueError(f"{function}: sigmas must be at least two decreasing non-negative numbers, got {sigmas}")
    levels = sigmas.tolist()
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            change = sigma**2 - lower**2
            level = torch.tensor(sigma, dtype=x.dtype, device=x.device)
            x = x + change * call_field(field, x, level)
            if k < len(levels) - 1:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = x + math.sqrt(change) * noise
            if callback is not None:
                callback(k, x)
    return x
