"""Density of the data in the box with noise, its score, and fields that leave it in place exactly, in closed form.

With a quarter turn J, ∇·(p_σ J∇ψ/p_σ) = 0 for every ψ, so that s + J∇ψ/p_σ leaves p_σ in place. Two choices of ψ:

- tangential: ψ = p_σ, which adds the score turned by 90 degrees. It follows the level sets of p_σ, and these the faces.
- outward: ψ = a p_σ φ with φ = cos(2πx) cos(2πy)/2π, which adds a (J∇φ + φ J s). It crosses the faces in both
  directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.rotation import quarter_turn
from experiments.constrained.domains import BOX_SPREAD, box_means

STRENGTH = 15.0  # a


@dataclass(frozen=True)
class SmoothedBox:
    """Density p_σ of `domains.draw_box` with noise of standard deviation σ.

    A coordinate of a component is a normal number cut off at ±1, plus noise. Its density is that without the cut, times
    the posterior probability that the number was between ±1, over the prior probability.

    Attributes:
        sigma: σ > 0.
        dim: D.
    """

    sigma: float
    dim: int = 2

    def log_density(self, z: Tensor) -> Tensor:
        """Return log p_σ at z `[n, D]`, `[n]`, float64."""
        return self._component_logs(z).logsumexp(-1) - math.log(3)

    def score(self, z: Tensor) -> Tensor:
        """Return ∇ log p_σ at z `[n, D]`, with the dtype of z; differentiable."""
        weight = self._component_logs(z).softmax(-1).unsqueeze(-1)
        means, total, posterior, spread = self._posterior(z)
        low, high = (-1 - posterior) / spread, (1 - posterior) / spread
        log_probability = _log_probability(posterior, spread)
        edge = (_log_normal(low) - log_probability).exp() - (_log_normal(high) - log_probability).exp()
        slopes = (means - z.double().unsqueeze(1)) / total + edge * BOX_SPREAD**2 / (total * spread)
        return (weight * slopes).sum(1).to(z)

    def tangential(self, z: Tensor) -> Tensor:
        """Return s + J s."""
        score = self.score(z)
        return score + quarter_turn(score)

    def outward(self, z: Tensor) -> Tensor:
        """Return s + a (J∇φ + φ J s)."""
        return self.score(z) + self.circulation(z)

    def circulation(self, z: Tensor) -> Tensor:
        """Return the part a (J∇φ + φ J s) of the outward field."""
        wave = 2 * torch.pi * z
        (sine_x, sine_y), (cosine_x, cosine_y) = wave.sin().unbind(-1), wave.cos().unbind(-1)
        phi = (cosine_x * cosine_y / (2 * torch.pi)).unsqueeze(-1)
        gradient = -torch.stack([sine_x * cosine_y, cosine_x * sine_y], -1)
        return STRENGTH * (quarter_turn(gradient) + phi * quarter_turn(self.score(z)))

    def _posterior(self, z: Tensor) -> tuple[Tensor, float, Tensor, float]:
        """Means `[3, D]`, variance with noise, and mean `[n, 3, D]` and spread of the number before the noise."""
        means, prior, noise = box_means(self.dim).to(z.device), BOX_SPREAD**2, self.sigma**2
        total = prior + noise
        return means, total, (means * noise + z.double().unsqueeze(1) * prior) / total, (prior * noise / total) ** 0.5

    def _component_logs(self, z: Tensor) -> Tensor:
        """Log densities of the components, `[n, 3]`."""
        means, total, posterior, spread = self._posterior(z)
        logs = _log_normal((z.double().unsqueeze(1) - means) / total**0.5) - 0.5 * math.log(total)
        logs = logs + _log_probability(posterior, spread) - _log_probability(means, BOX_SPREAD)
        return logs.sum(-1)


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * x.square() - 0.5 * math.log(2 * math.pi)


def _log_probability(mean: Tensor, spread: float) -> Tensor:
    """Log probability that a normal number lies in [-1, 1], by a difference of tails in which no digits cancel."""
    low, high = (-1 - mean) / spread, (1 - mean) / spread
    flip = low > 0  # both in the upper tail: mirrored
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-(lower - upper).exp())
