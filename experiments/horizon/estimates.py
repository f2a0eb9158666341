"""Mode crossing, the loss at a fixed horizon, and what is read off its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from fluxkernels import langevin_chain
from fluxmatching import Draws, UniformHorizon, flux_target

Field = Callable[[Tensor], Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]

GROUP = 32  # minibatches that go through the loss together; bounds the memory of the transition weights
FINE_STEP = 0.04  # of the chain behind `autocorrelation`, in units of σ²


@dataclass(frozen=True)
class Crossing:
    """Ends of Langevin chains `[N, 2]`, and whether each ended in another mode than it started in, `[N]`."""

    end: Tensor
    crossed: Tensor

    @property
    def share(self) -> float:
        """Share of the chains that crossed."""
        return self.crossed.double().mean().item()


def nearest_mode(x: Tensor, means: Tensor) -> Tensor:
    """Index of the nearest mean: `[N, D]` and `[K, D]` to `[N]`."""
    return (x.unsqueeze(-2) - means).square().sum(-1).argmin(-1)


def cross_modes(
    means: Tensor,
    sigma: float,
    tau: float,
    steps: int,
    n: int,
    generator: torch.Generator,
    backend: str | None,
) -> Crossing:
    """Run `n` chains of Eq. 8 from exact samples of p_σ, for the time τ in `steps` steps."""
    start = GaussianMixture(means, sigma**2).sample(n, generator)
    end = langevin_chain(start, means, sigma**2, tau, steps=steps, seed=_seed(generator), backend=backend)
    return Crossing(end, nearest_mode(start, means) != nearest_mode(end, means))


def loss_at(
    field: Field,
    means: Tensor,
    sigma: float,
    tau: float,
    *,
    estimator: str,
    batch: int,
    minibatches: int,
    generator: torch.Generator,
    backend: str | None,
) -> Tensor:
    """σ⁴ ℓ(τ) of independent minibatches, `[minibatches]`: the loss at one horizon, without its 1/q(τ).

    The expectation is 2 σ⁴ E[r(x_0) r(x_τ)], without dimension (Lemma A.2 in time units of σ²). A minibatch
    is a group of the grouped loss, which treats groups independently, so many go through it at once.

    Args:
        field: f, acts on the last dimension.
        means: the clean data are these points, equally often, `[K, D]`.
        sigma: noise level.
        tau: horizon in units of σ².
        estimator: "cross_chain" or "single_chain".
        batch: samples a minibatch.
        minibatches: how many.
        generator: of all random numbers, on the CPU.
        backend: of the ops.
    """
    horizon = UniformHorizon(tau_max=max(tau, 1.0))
    losses = []
    for begin in range(0, minibatches, GROUP):
        groups = min(GROUP, minibatches - begin)
        x = means[torch.randint(len(means), (batch, groups), generator=generator).to(means.device)]
        target = flux_target(
            field,
            x,
            sigma**2,
            refs=means.unsqueeze(1),
            horizon=horizon,
            grouped=True,
            estimator=estimator,
            divergence="exact",
            draws=Draws(tau=means.new_full((groups,), tau)),
            seed=_seed(generator),
            backend=backend,
        )
        losses.append(target.loss(field).sum(-1).mean(0))
    return sigma**4 * torch.cat(losses).detach() / horizon.tau_max


def residual(field: Field, mixture: GaussianMixture, x: Tensor) -> Tensor:
    """r = ∇·u + u·s with u = f - s, by automatic differentiation of the exact score: `[N, D]` to `[N]`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = mixture.score(x)
        u = field(x) - score
        divergence = torch.zeros_like(x[:, 0])
        for d in range(x.shape[-1]):
            divergence = divergence + torch.autograd.grad(u[:, d].sum(), x, retain_graph=True)[0][:, d]
        return (divergence + (u * score).sum(-1)).detach()


def autocorrelation(
    field: Field,
    means: Tensor,
    sigma: float,
    taus: tuple[float, ...],
    n: int,
    generator: torch.Generator,
    backend: str | None,
) -> tuple[Array, Array]:
    """2 σ⁴ E[r(x_0) r(x_τ)] and its standard error at increasing `taus`.

    The loss by its definition (Eq. 5, first line): no integration by parts, no transition weights, and a
    chain of fine steps, so it shares no approximation with `loss_at`.
    """
    mixture = GaussianMixture(means, sigma**2)
    x = mixture.sample(n, generator)
    first = residual(field, mixture, x)
    values, errors, now = [], [], 0.0
    for tau in taus:
        if tau > now:
            steps = math.ceil((tau - now) / FINE_STEP)
            x = langevin_chain(x, means, sigma**2, tau - now, steps=steps, seed=_seed(generator), backend=backend)
            now = tau
        product = 2 * sigma**4 * first * residual(field, mixture, x)
        values.append(product.mean().item())
        errors.append(product.std().item() / math.sqrt(n))
    return np.array(values), np.array(errors)


@dataclass(frozen=True)
class ExponentialFit:
    """log ℓ(τ) falls by rate τ, and the R² of that line."""

    rate: float
    r_squared: float


def fit_exponential(tau: Array, mean: Array, error: Array, low: float, high: float) -> ExponentialFit:
    """Least-squares line through log ℓ over low ≤ τ ≤ high, where ℓ exceeds zero by two standard errors."""
    used = (tau >= low) & (tau <= high) & (mean > 2 * error)
    if used.sum() < 3:
        return ExponentialFit(math.nan, math.nan)
    x, y = tau[used], np.log(mean[used])
    slope, intercept = np.polyfit(x, y, 1)
    unexplained = np.square(y - slope * x - intercept).sum()
    return ExponentialFit(-float(slope), float(1 - unexplained / np.square(y - y.mean()).sum()))


def share_beyond(tau: Array, mean: Array, cut: float) -> float:
    """∫_{τ > cut} ℓ dτ / ∫ ℓ dτ over the curve's range, by trapezoids; `cut` is one of the points."""
    tail = tau >= cut
    return float(np.trapezoid(mean[tail], tau[tail]) / np.trapezoid(mean, tau))


def relative_band(tau: Array, mean: Array, std: Array, high: float) -> float:
    """∫_0^high std dτ / ∫_0^high ℓ dτ: the half-width of the band of Figure 16 beside the curve's height."""
    used = tau <= high
    return float(np.trapezoid(std[used], tau[used]) / np.trapezoid(mean[used], tau[used]))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
