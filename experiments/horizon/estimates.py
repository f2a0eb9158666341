"""Mode crossing, the loss at a fixed horizon, and the numbers read from its curve."""

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
from fluxmatching import Draws, FluxOptions, UniformHorizon, flux_target

Field = Callable[[Tensor], Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]

GROUP = 32  # minibatches that go through the loss together; bounds the memory of the transition weights
FINE_STEP = 0.04  # of the chain behind `autocorrelation`, in units of σ²


@dataclass(frozen=True)
class Crossing:
    """Ends of Langevin chains `[N, 2]`, and a mask of those that ended in another mode than their first, `[N]`."""

    end: Tensor
    crossed: Tensor

    @property
    def share(self) -> float:
        """Fraction of the chains that crossed."""
        return self.crossed.double().mean().item()


def nearest_mode(x: Tensor, means: Tensor) -> Tensor:
    """Return the index of the nearest mean: `[N, D]` and `[K, D]` to `[N]`."""
    return (x.unsqueeze(-2) - means).square().sum(-1).argmin(-1)


def cross_modes(
    means: Tensor,
    sigma: float,
    tau: float,
    num_steps: int,
    n: int,
    generator: torch.Generator,
    backend: str | None,
) -> Crossing:
    """Run `n` chains of Eq. 8 from exact samples of p_σ, for the time τ in `steps` steps."""
    start = GaussianMixture(means, sigma**2).sample(n, generator)
    end = langevin_chain(start, means, sigma**2, tau, num_steps=num_steps, seed=_seed(generator), backend=backend)
    return Crossing(end, nearest_mode(start, means) != nearest_mode(end, means))


@dataclass(frozen=True)
class AtHorizon:
    """A field at one noise level and one horizon.

    Args:
        field: f, acts on the last dimension.
        means: the clean data are these points, equally often, `[K, D]`.
        sigma: noise level.
        tau: horizon in units of σ².
    """

    field: Field
    means: Tensor
    sigma: float
    tau: float


def loss_at(
    problem: AtHorizon,
    *,
    estimator: str,
    batch: int,
    minibatches: int,
    generator: torch.Generator,
    backend: str | None,
) -> Tensor:
    """Estimate σ⁴ ℓ(τ), the loss at one horizon without its 1/q(τ), once per minibatch: `[minibatches]`.

    The expectation is 2 σ⁴ E[r(x_0) r(x_τ)], without dimension (Lemma A.2 in time units of σ²). A minibatch is a
    group of the grouped loss. Groups are independent, so one call computes many of them.

    Args:
        problem: field, reference points, σ and τ.
        estimator: "cross_chain" or "single_chain".
        batch: samples per minibatch.
        minibatches: number of minibatches.
        generator: generator of all random numbers, on the CPU.
        backend: backend of the ops.
    """
    field, means, sigma, tau = problem.field, problem.means, problem.sigma, problem.tau
    horizon = UniformHorizon(tau_max=max(tau, 1.0))
    options = FluxOptions(horizon=horizon, grouped=True, estimator=estimator, divergence="exact", backend=backend)
    losses = []
    for begin in range(0, minibatches, GROUP):
        groups = min(GROUP, minibatches - begin)
        x = means[torch.randint(len(means), (batch, groups), generator=generator).to(means.device)]
        target = flux_target(
            field,
            x,
            sigma,
            options,
            refs=means.unsqueeze(1),
            draws=Draws(tau=means.new_full((groups,), tau)),
            seed=_seed(generator),
        )
        losses.append(target.terms(field).sum(-1).mean(0))
    return sigma**4 * torch.cat(losses).detach() / horizon.tau_max


def residual(field: Field, mixture: GaussianMixture, x: Tensor) -> Tensor:
    """Compute r = ∇·u + u·s with u = f - s, by automatic differentiation of the exact score: `[N, D]` to `[N]`."""
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
    """Estimate 2 σ⁴ E[r(x_0) r(x_τ)] and its standard error at increasing `taus`.

    This is the definition of the loss (Eq. 5, first line): no integration by parts, no transition weights, and a
    chain of fine steps. So it shares no approximation with `loss_at`.
    """
    mixture = GaussianMixture(means, sigma**2)
    x = mixture.sample(n, generator)
    first = residual(field, mixture, x)
    values, errors, now = [], [], 0.0
    for tau in taus:
        if tau > now:
            num_steps = math.ceil((tau - now) / FINE_STEP)
            x = langevin_chain(
                x, means, sigma**2, tau - now, num_steps=num_steps, seed=_seed(generator), backend=backend
            )
            now = tau
        product = 2 * sigma**4 * first * residual(field, mixture, x)
        values.append(product.mean().item())
        errors.append(product.std().item() / math.sqrt(n))
    return np.array(values), np.array(errors)


@dataclass(frozen=True)
class ExponentialFit:
    """Line through log ℓ(τ): its slope is -rate."""

    rate: float
    r_squared: float


def fit_exponential(tau: Array, mean: Array, error: Array, low: float, high: float) -> ExponentialFit:
    """Fit a line to log ℓ by least squares, over low ≤ τ ≤ high and points at least two standard errors above 0."""
    used = (tau >= low) & (tau <= high) & (mean > 2 * error)
    if used.sum() < 3:
        return ExponentialFit(math.nan, math.nan)
    x, y = tau[used], np.log(mean[used])
    slope, intercept = np.polyfit(x, y, 1)
    unexplained = np.square(y - slope * x - intercept).sum()
    return ExponentialFit(-float(slope), float(1 - unexplained / np.square(y - y.mean()).sum()))


def share_beyond(tau: Array, mean: Array, cut: float) -> float:
    """Compute ∫_{τ > cut} ℓ dτ / ∫ ℓ dτ over the range of the curve, by trapezoids; `cut` is one of the points."""
    tail = tau >= cut
    return float(np.trapezoid(mean[tail], tau[tail]) / np.trapezoid(mean, tau))


def relative_band(tau: Array, mean: Array, std: Array, high: float) -> float:
    """Compute ∫_0^high std dτ / ∫_0^high ℓ dτ: half the width of Figure 16's band over the height of its curve."""
    used = tau <= high
    return float(np.trapezoid(std[used], tau[used]) / np.trapezoid(mean[used], tau[used]))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
