"""Samplers that take a learned field in place of the score (Sec. 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fluxkernels.checks import check_finite, check_positive, check_sigma_range, check_steps, check_tensor, one_of
from fluxmatching.endpoint import call_field

NoisyField = Callable[[Tensor, Tensor], Tensor]  # f(x, σ)
Callback = Callable[[int, Tensor], None]
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")  # of torchdiffeq, by their order


def unadjusted_langevin(
    field: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
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
    check_samples(function, x)
    check_steps(function, steps)
    step = check_positive(function, "step", step)
    with torch.no_grad():
        for k in range(1, steps + 1):
            x = x + step * call_field(field, x) + math.sqrt(2 * step) * _noise_like(x, generator)
            if callback is not None:
                callback(k, x)
    return x


def log_sigma_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """`[steps + 1]` noise levels from sigma_max down to sigma_min, equal ratios, float64 (Algorithm 3)."""
    check_steps("log_sigma_grid", steps)
    check_sigma_range("log_sigma_grid", sigma_min, sigma_max)
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1, dtype=torch.float64).exp()


def edm_sigma_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`[steps + 1]` noise levels, float64: σ_i^(1/ρ) in equal steps from sigma_max to sigma_min, then 0.

    Karras et al. (2022, Eq. 5): ρ = 7 puts most of them at small σ.
    """
    check_steps("edm_sigma_grid", steps)
    check_sigma_range("edm_sigma_grid", sigma_min, sigma_max)
    rho = check_positive("edm_sigma_grid", "rho", rho)
    powers = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([powers**rho, torch.zeros(1, dtype=torch.float64)])


def reverse_ve(
    field: NoisyField,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
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
    levels = _levels("reverse_ve", x, sigmas)
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
    """Predictor-corrector sampling (Song et al. 2021; Algorithm 3): 2K - 1 evaluations of the field for K steps.

    Each step is one of `reverse_ve` from σ_k to σ_{k+1}, then, but for the last, one Langevin step at σ_{k+1},

        x ← x + ε f(x, σ_{k+1}) + √(2ε) z,   ε = 2 (r |z| / |f(x, σ_{k+1})|)²,

    with |z| and |f| the mean norms over the minibatch, as in Song et al.'s program: for a single sample in few
    dimensions |f| comes near zero, and ε has no mean. A field that is zero everywhere has no ε: the result is NaN.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as `log_sigma_grid(K)`.
        signal_to_noise: r > 0.
        generator: of the noise, on the device of x; None for torch's own.
        callback: called as `callback(k, x)` after step k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    levels = _levels("predictor_corrector", x, sigmas)
    ratio = check_positive("predictor_corrector", "signal_to_noise", signal_to_noise)
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            last = k == len(levels) - 1
            x = _predict(field, x, sigma, lower, generator, noisy=not last)
            if not last:
                f, noise = _at(field, x, lower), _noise_like(x, generator)
                step = 2 * (ratio * _mean_norm(noise) / _mean_norm(f)).square()
                x = x + step * f + (2 * step).sqrt() * noise
            if callback is not None:
                callback(k, x)
    return x


def edm_heun(field: NoisyField, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Deterministic sampling of Karras et al. (2022, Algorithm 1): Heun's method on dx/dσ = -σ f(x, σ).

    Two evaluations of the field a step, one for a last step to σ = 0.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`, such as `edm_sigma_grid(K)`.
        callback: called as `callback(k, x)` after step k = 1 … K.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    levels = _levels("edm_heun", x, sigmas)
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(pairwise(levels), start=1):
            slope = -sigma * _at(field, x, sigma)
            following = x + (lower - sigma) * slope
            if lower > 0:
                slope = (slope - lower * _at(field, following, lower)) / 2
                following = x + (lower - sigma) * slope
            x = following
            if callback is not None:
                callback(k, x)
    return x


def probability_flow(
    field: NoisyField,
    x: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "adaptive_heun",
) -> Tensor:
    """Sampling by the probability-flow ODE dx/dσ = -σ f(x, σ), with error control (Sec. 3.5, Table 4).

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_max² I).
        sigma_min, sigma_max: ends of the integration, 0 < sigma_min < sigma_max.
        rtol, atol: relative and absolute tolerance a step, as a root mean square over all of x.
        method: an adaptive one of `torchdiffeq.odeint`: "adaptive_heun", "bosh3", "dopri5" and others.

    Returns:
        `[N, *event]`, at noise level sigma_min.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met, as with a field that is not finite.
    """
    function = "probability_flow"
    check_samples(function, x)
    check_sigma_range(function, sigma_min, sigma_max)
    with torch.no_grad():
        end: Tensor = integrate(
            function,
            lambda sigma, z: -sigma.to(z.dtype) * call_field(field, z, sigma.to(z.dtype)),
            x,
            (sigma_max, sigma_min),
            rtol=rtol,
            atol=atol,
            method=method,
        )
    return end


def integrate(
    function: str,
    velocity: Callable[..., Any],
    state: Any,
    ends: tuple[float, float],
    *,
    rtol: float,
    atol: float,
    method: str,
) -> Any:
    """The solution at ends[1] of d state/dσ = velocity(σ, state), by torchdiffeq; state is a tensor or a tuple of them.

    Raises:
        ImportError: torchdiffeq is not installed.
        RuntimeError: the tolerance cannot be met.
    """
    rtol, atol = check_positive(function, "rtol", rtol), check_positive(function, "atol", atol)
    one_of(function, "method", method, ADAPTIVE)
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"fluxmatching.{function} needs torchdiffeq: pip install torchdiffeq") from error
    first = state if isinstance(state, Tensor) else state[0]
    sigmas = torch.tensor(ends, dtype=torch.float64, device=first.device)
    # Else its last step goes past the end, to negative σ, and what it interpolates from there can be far off.
    options = {"step_t": sigmas[1:]}
    reached = [ends[0]]

    def watched(sigma: Tensor, state: Any) -> Any:
        reached.append(sigma.item())
        return velocity(sigma, state)

    try:
        path = odeint(watched, state, sigmas, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # its step underflows
        raise RuntimeError(
            f"{function}: no step meets rtol {rtol:g} and atol {atol:g} at sigma {reached[-1]:.4g}; is the field "
            f"finite there?"
        ) from error
    return path[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in path)


def check_samples(function: str, x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a finite `[N, *event]`."""
    check_tensor(function, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{function}: x must have shape [N, *event], got {list(x.shape)}")
    check_finite(function, x=x)


def _levels(function: str, x: Tensor, sigmas: Tensor) -> list[float]:
    check_samples(function, x)
    check_tensor(function, "sigmas", sigmas)
    check_finite(function, sigmas=sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not ((sigmas[1:] < sigmas[:-1]).all() and sigmas[-1] >= 0):
        raise ValueError(f"{function}: sigmas must be at least two decreasing non-negative numbers, got {sigmas}")
    levels: list[float] = sigmas.tolist()
    return levels


def _at(field: NoisyField, x: Tensor, sigma: float) -> Tensor:
    return call_field(field, x, torch.tensor(sigma, dtype=x.dtype, device=x.device))


def _predict(
    field: NoisyField, x: Tensor, sigma: float, lower: float, generator: torch.Generator | None, noisy: bool
) -> Tensor:
    change = sigma**2 - lower**2
    x = x + change * _at(field, x, sigma)
    return x + math.sqrt(change) * _noise_like(x, generator) if noisy else x


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _mean_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).mean()
