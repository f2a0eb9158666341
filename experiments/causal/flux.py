"""The flux loss of the paper, on a kernel density estimate, as a quadratic function of the parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.causal.drifts import Basis
from experiments.causal.quadratic import Dense
from experiments.common.kernel_weights import kernel_weights
from fluxkernels import FluxPass, flux_pass, residual_gradient, transition_weights
from fluxmatching import TruncatedExponentialHorizon

CHUNK = 2**25  # numbers in memory at once where moments are computed


@dataclass(frozen=True)
class FluxSettings:
    """Settings of the loss.

    Attributes:
        sigma: σ of the density estimate.
        chains: number of chains per horizon.
        horizons: number of horizons τ, one per stratum of their distribution.
        smoothed: whether the drift is compared through f_σ(y) = E[f(x) | y] in place of f.
        backend: backend of the ops.
    """

    sigma: float
    chains: int
    horizons: int
    smoothed: bool
    backend: str | None = None


def flux_quadratic(x: Tensor, basis: Basis, noise: float, settings: FluxSettings, generator: torch.Generator) -> Dense:
    """Return half the mean of `flux_matching_loss` for fixed random numbers, of the parameters that are allowed.

    All samples are reference points. The diffusion of the loss has a factor 2, so its field is f 2/σ². The matrix of
    the gradient is symmetric only in expectation. Its symmetric part is taken, and its negative eigenvalues are set
    to zero.

    Args:
        x: samples, `[n, d]`.
        basis: of the drift.
        noise: σ of the diffusion.
        settings: of the loss.
        generator: of the samples that start chains, of horizons and of noise.
    """
    horizon = TruncatedExponentialHorizon(1.0, 4.0)
    parts = []
    for k in range(settings.horizons):
        uniform = (k + torch.rand((), generator=generator, dtype=torch.float64)) / settings.horizons
        tau = horizon.quantile(uniform, torch.tensor(settings.sigma, dtype=torch.float64))
        starts = x[torch.randperm(len(x), generator=generator)[: settings.chains]]
        seed = int(torch.randint(2**62, (), generator=generator))
        chains = flux_pass(starts, x, settings.sigma**2, tau, seed=seed, backend=settings.backend)
        weight = (-tau - horizon.log_density(tau, torch.tensor(settings.sigma, dtype=torch.float64))).exp()
        scale = weight / settings.horizons
        parts.append([scale * part for part in of_chains(chains, x, basis, noise, settings, tau)])
    hessian, linear, constant = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    found = Dense(0.5 * (hessian + hessian.T), linear, constant)
    found = found.restrict(basis.allowed.flatten())
    values, vectors = torch.linalg.eigh(found.hessian)
    return Dense(vectors * values.clamp_min(0) @ vectors.T, found.linear, found.constant)


def of_chains(
    chains: FluxPass, refs: Tensor, basis: Basis, noise: float, settings: FluxSettings, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, b, c): for e^τ q(τ) = 1, half the gradient of the loss is A θ + b, and c is half its value at θ = 0.

    ∇r is the sum over (i, p) of θ_ip κ_i [∇∂_i b_p + s_i ∇b_p + b_p ∇s_i], κ_i = 2 scale_i/σ², and of -∇(Δp̂/p̂).
    """
    variance, n = settings.sigma**2, len(chains.x0)
    at_start = derivatives(chains.x0, refs, basis, settings)[0]
    value, gradient, hessian = derivatives(chains.xt, refs, basis, settings)
    weights = transition_weights(chains.x0, chains.xt, refs, variance, tau, backend=settings.backend)
    zero = torch.zeros_like(chains.xt)
    alone = residual_gradient(chains.xt, zero, refs, variance, backend=settings.backend)
    score_slopes = score_jacobian(chains.xt, refs, settings.sigma)
    # of (i', p') in direction i: `[n, i', p', i]`
    slopes = hessian.transpose(1, 2) + chains.score_t[:, :, None, None] * gradient[:, None]
    slopes = slopes + value[:, None, :, None] * score_slopes[:, :, None]
    factor = 2 * basis.scale / noise**2
    slopes = slopes * factor[:, None, None]
    moved = -weights.T @ at_start / n
    matrix = torch.einsum("np,niqj->jpiq", moved, slopes) * factor[:, None, None, None]
    linear = factor[:, None] * (alone.T @ moved)
    constant = ((weights.T @ chains.score0) * alone).sum() / n
    size = linear.numel()
    return matrix.reshape(size, size), linear.flatten(), constant


def derivatives(z: Tensor, refs: Tensor, basis: Basis, settings: FluxSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return b `[n, P]`, ∇b `[n, P, d]` and ∇∇b `[n, P, d, d]` at z; of E[b(x) | z] where drifts are smoothed.

    Derivatives of a mean under the weights of the density estimate are central moments with r/σ².
    """
    d = z.shape[1]
    if not settings.smoothed:
        first, second = basis.derivatives(z)
        places = torch.nn.functional.one_hot(basis.coordinates + 1, d + 1)[:, 1:].to(z)
        return basis(z), first[..., None] * places, second[..., None, None] * places[:, :, None] * places[:, None]
    values, found = basis(refs), []
    for points in z.split(max(1, CHUNK // (len(refs) * d**2))):
        weights = kernel_weights(points, refs, settings.sigma)
        mean = weights @ values
        offset = (refs - (weights @ refs)[:, None]) / settings.sigma**2  # [k, M, d]
        centered = values - mean[:, None]
        gradient = centered.mT @ (weights[..., None] * offset)
        products = (offset[..., :, None] * offset[..., None, :]).flatten(2)
        hessian = centered.mT @ (weights[..., None] * products)
        found.append((mean, gradient, hessian.unflatten(-1, (d, d))))
    mean, gradient, hessian = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mean, gradient, hessian


def score_jacobian(z: Tensor, refs: Tensor, sigma: float) -> Tensor:
    """Return the derivative of the score, (Cov/σ² - I)/σ² under the weights of the density estimate, `[n, d, d]`."""
    found = []
    for points in z.split(max(1, CHUNK // refs.numel())):
        weights = kernel_weights(points, refs, sigma)
        offset = (refs - (weights @ refs)[:, None]) / sigma**2
        found.append(offset.mT @ (weights[..., None] * offset))
    return torch.cat(found) - torch.eye(z.shape[1], dtype=z.dtype) / sigma**2
