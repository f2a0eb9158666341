"""Reverse variance-exploding diffusion, alone and with Langevin corrections (Algorithm 3)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fluxkernels.checks import check_positive
from fluxmatching.fields import NoisyField, call_field
from fluxmatching.sampling.langevin import Callback, noise_like
from fluxmatching.sampling.schedules import check_levels


def reverse_ve(
    field: NoisyField,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Run the reverse variance-exploding diffusion (Song et al. 2021; the predictor of Algorithm 3).

    x ← x + Δ_k f(x, σ_k) + √Δ_k ξ with Δ_k = σ_k² - σ_{k+1}²; the last update adds no noise.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as those of `exponential_schedule(K)`.
        generator: makes the noise, on the device of x; None uses torch's own.
        callback: called as `callback(k, x)` after update k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    levels = check_levels("reverse_ve", x, sigmas)
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            x = _predict(field, x, sigma, lower, generator, noisy=k < len(levels) - 1)
            if callback is not None:
                callback(k, x)
    return x


def predictor_corrector(
    field: NoisyField,
    x: Tensor,
    sigmas: Tensor,
    *,
    signal_to_noise: float = 0.16,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by predictor and corrector (Song et al. 2021; Algorithm 3): 2K - 1 evaluations of the field for K steps.

    Each step is one of `reverse_ve` from σ_k to σ_{k+1}. All but the last are followed by a Langevin step at σ_{k+1},

        x ← x + ε f(x, σ_{k+1}) + √(2ε) z,   ε = 2 (r |z| / |f(x, σ_{k+1})|)²,

    with |z| and |f| the mean norms over the minibatch, as in the program of Song et al.: for a single sample in few
    dimensions |f| comes near zero, and ε has no mean. For a field that is zero everywhere the result is NaN.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as those of `exponential_schedule(K)`.
        signal_to_noise: r > 0.
        generator: makes the noise, on the device of x; None uses torch's own.
        callback: called as `callback(k, x)` after step k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    levels = check_levels("predictor_corrector", x, sigmas)
    ratio = check_positive("predictor_corrector", "signal_to_noise", signal_to_noise)
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            last = k == len(levels) - 1
            x = _predict(field, x, sigma, lower, generator, noisy=not last)
            if not last:
                f, noise = field_at(field, x, lower), noise_like(x, generator)
                step = 2 * (ratio * _mean_norm(noise) / _mean_norm(f)).square()
                x = x + step * f + (2 * step).sqrt() * noise
            if callback is not None:
                callback(k, x)
    return x


def field_at(field: NoisyField, x: Tensor, sigma: float) -> Tensor:
    """Evaluate the field at a noise level given as a number."""
    return call_field(field, x, torch.tensor(sigma, dtype=x.dtype, device=x.device))


def _predict(
    field: NoisyField, x: Tensor, sigma: float, lower: float, generator: torch.Generator | None, noisy: bool
) -> Tensor:
    change = sigma**2 - lower**2
    x = x + change * field_at(field, x, sigma)
    return x + math.sqrt(change) * noise_like(x, generator) if noisy else x


def _mean_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).mean()
