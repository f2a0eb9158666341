"""Distributions of the simulation horizon τ = t/σ² (Sec. D.1.1), densities on [0, τ_max] with τ_max = 4 by default."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkernels.checks import check_positive
from fluxmatching.losses.noise_levels import LinearInLogSigma


class Horizon(nn.Module):
    """Distribution q of τ, which may depend on σ.

    Subclasses define the rate λ ≥ 0 of the truncated exponential q(τ) = λ e^{-λτ}/(1 - e^{-λ τ_max}) (Eq. 49);
    λ = 0 is the uniform distribution.

    Args:
        tau_max: end of the support; 4 is the paper's T = 4σ².
    """

    learned = False

    def __init__(self, tau_max: float = 4.0) -> None:
        super().__init__()
        self.tau_max = check_positive(type(self).__name__, "tau_max", tau_max)

    def rate(self, sigma: Tensor | None, like: Tensor) -> Tensor:
        """Return λ(σ), shape of sigma or `[]`, with the dtype and device of `like`."""
        raise NotImplementedError

    def quantile(self, uniform: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return τ with P(T ≤ τ) = uniform. No gradient flows to λ.

        Args:
            uniform: numbers in [0, 1], any shape.
            sigma: σ, broadcastable to it.
        """
        with torch.no_grad():
            rate = self.rate(sigma, uniform)
            scaled = rate * self.tau_max
            small = scaled < 1e-4
            safe = torch.where(small, torch.ones_like(scaled), scaled)
            exponential = -torch.log1p(uniform * torch.expm1(-safe)) / safe
            # Second order in λ: the uniform distribution and its first correction.
            near_uniform = uniform * (1 - 0.5 * scaled * (1 - uniform))
            return self.tau_max * torch.where(small, near_uniform, exponential).clamp(max=1)

    def log_density(self, tau: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return log q(τ), differentiable in λ; -∞ outside [0, τ_max]."""
        rate = self.rate(sigma, tau)
        scaled = rate * self.tau_max
        small = scaled < 1e-4
        safe = torch.where(small, torch.ones_like(scaled), scaled)
        log_mass = torch.where(small, -0.5 * scaled, torch.log(-torch.expm1(-safe) / safe))
        log_density = -rate * tau - log_mass - math.log(self.tau_max)
        return torch.where((tau >= 0) & (tau <= self.tau_max), log_density, -torch.inf)

    def fit_loss(self, tau: Tensor, loss: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return -sg(loss) log q(τ) (Eq. 50, Eq. 51); its mean is smallest where q follows the loss over τ.

        Args:
            tau: the horizon that was drawn, shape `[]`, or `[N]` with one per sample.
            loss: losses of the minibatch (importance weighted, normalized), `[N]`.
            sigma: σ, shape `[]`.

        Returns:
            `[N]`.
        """
        return -loss.detach() * self.log_density(tau.detach(), sigma)


class UniformHorizon(Horizon):
    """Uniform distribution on [0, τ_max], the paper's first choice. Its gradients have a higher variance."""

    def rate(self, sigma: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=like.dtype, device=like.device)


class TruncatedExponentialHorizon(Horizon):
    """Truncated exponential q(τ) = λ e^{-λτ}/(1 - e^{-λ τ_max}) (Eq. 49), λ fixed or learned (Eq. 50).

    Args:
        rate: λ > 0, or its initial value.
        tau_max: end of the support.
        learned: whether λ is a parameter, fitted with `fit_loss`.
    """

    def __init__(self, rate: float = 1.0, tau_max: float = 4.0, *, learned: bool = False) -> None:
        super().__init__(tau_max)
        self.fixed_rate = check_positive(type(self).__name__, "rate", rate)
        self.learned = learned
        # softplus(raw) = rate
        raw = torch.tensor(self.fixed_rate + math.log(-math.expm1(-self.fixed_rate)))
        self.raw_rate = nn.Parameter(raw) if learned else None

    def rate(self, sigma: Tensor | None, like: Tensor) -> Tensor:
        if self.raw_rate is None:  # made on the device: a copy would wait for it
            return torch.full((), self.fixed_rate, dtype=like.dtype, device=like.device)
        return F.softplus(self.raw_rate).to(dtype=like.dtype, device=like.device)


# The loss decays about like e^{-τ}, so with rate 1 the weights e^{-τ}/q(τ) of all τ are equal.
DEFAULT_HORIZON = TruncatedExponentialHorizon(1.0)


class LearnedHorizon(Horizon):
    """Truncated exponential with a learned rate λ_φ(σ) = 1 + softplus(layer(log σ / 4)) (Eq. 51).

    Args:
        hidden: width of the layer's hidden linear map.
        tau_max: end of the support.
    """

    learned = True

    def __init__(self, hidden: int = 256, tau_max: float = 4.0) -> None:
        super().__init__(tau_max)
        self.layer = LinearInLogSigma(hidden)

    def rate(self, sigma: Tensor | None, like: Tensor) -> Tensor:
        if sigma is None:
            raise ValueError("LearnedHorizon needs sigma")
        return (1 + F.softplus(self.layer(sigma))).to(dtype=like.dtype, device=like.device)
