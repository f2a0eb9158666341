"""Losses whose expectation is known, and their estimates with standard errors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fluxkernels as fk
from fluxmatching import Draws, FluxOptions, UniformHorizon, flux_matching_loss

F64 = torch.float64
METHODS = [
    (estimator, second_derivatives, divergence)
    for estimator in ("cross_chain", "single_chain")
    for second_derivatives in ("double_backward", "forward_over_reverse", "finite_difference")
    for divergence in ("hutchinson", "exact")
]


def stratified(batches: int, tau_max: float = 4.0) -> list[Tensor]:
    """Midpoints of equal slices of [0, τ_max]: the mean over them is the mean over τ with no variance from τ."""
    return [torch.tensor(tau_max * (k + 0.5) / batches, dtype=F64) for k in range(batches)]


def estimate(batches: int, loss: Callable[[Draws], Tensor]) -> tuple[float, float]:
    """Mean over independent minibatches and its standard error."""
    means = torch.stack([loss(Draws(tau=tau)).mean() for tau in stratified(batches)])
    # Stratified in τ, so neighbors differ by chance alone: their differences measure the variance.
    return means.mean().item(), (means.diff().square().mean() / 2 / batches).sqrt().item()


def rotated(scalar: Callable[[Tensor], Tensor], z: Tensor, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """J∇ψ/p at z, J a rotation by 90°, differentiable."""
    with torch.enable_grad():
        z = z if z.requires_grad else z.requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(z).sum(), z, create_graph=True)
        return torch.stack((-gradient[:, 1], gradient[:, 0]), 1) * torch.exp(-log_density(z)).unsqueeze(1)


def mixture_fields(violating: bool) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """(s + J∇ψ/p or its violating twin s + ∇ψ/p, means, σ²) for a mixture of three Gaussians (Sec. B.1)."""
    means, sigma2 = torch.tensor([[0.0, 1.5], [-1.3, -0.75], [1.3, -0.75]], dtype=F64), 0.5

    def bump(z: Tensor) -> Tensor:
        return 0.02 * torch.exp(-(z - torch.tensor([0.4, 0.2], dtype=F64)).square().sum(1))

    def log_density(z: Tensor) -> Tensor:
        return fk.kde_log_density(z, means, sigma2)

    def field(z: Tensor) -> Tensor:
        turned = rotated(bump, z, log_density)
        perturbation = torch.stack((turned[:, 1], -turned[:, 0]), 1) if violating else turned
        return fk.kde_score(z, means, sigma2) + perturbation

    return field, means, sigma2


def gaussian(U: Tensor, *, batches: int = 40, **options: Any) -> tuple[float, float]:
    """Loss of f(x) = -x/σ² + Ux where x = 0 makes the KDE N(0, σ²I) and the chain exact: (mean, standard error).

    Its expectation is 2(1-e⁻⁸)|(U+Uᵀ)/2|²_F. `options` are those of `FluxOptions`.
    """
    D, sigma = len(U), 0.7
    x, refs = torch.zeros(512, D, dtype=F64), torch.zeros(1, D, dtype=F64)

    def loss(draws: Draws) -> Tensor:
        chosen = FluxOptions(horizon=UniformHorizon(), **options)
        return flux_matching_loss(lambda z: -z / sigma**2 + z @ U.T, x, sigma, chosen, refs=refs, draws=draws)

    return estimate(batches, loss)


def mixture(*, violating: bool, batches: int = 64, **options: Any) -> tuple[float, float]:
    """Loss of `mixture_fields` on exact samples of the mixture: (mean, standard error); `options` of `FluxOptions`."""
    field, means, sigma2 = mixture_fields(violating)

    def loss(draws: Draws) -> Tensor:
        x, chosen = means[torch.randint(3, (256,))], FluxOptions(horizon=UniformHorizon(), **options)
        return flux_matching_loss(field, x, math.sqrt(sigma2), chosen, refs=means, draws=draws)

    return estimate(batches, loss)


def smooth_field(D: int, seed: int = 0) -> nn.Module:
    """A small network with non-zero second derivatives, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()
