"""Scores of mixtures at all noise levels, and fields v that turn images in a plane."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.common.rotation import quarter_turn
from fluxmatching.fields import NoisyField, per_sample

FADE = math.log(2)  # range of log σ over which v fades out


class MixtureScore(nn.Module):
    """Score of a mixture with equal weights at the noise level σ, exact.

    Args:
        means: `[K, D]`.
        noise: standard deviation of a component at σ = 0.

    Shape:
        z `[n, *event]` of D numbers, σ `[]` or `[n]`; returns the shape of z.
    """

    accepts_sigma_per_sample = True

    def __init__(self, means: Tensor, noise: float) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.noise = noise

    def forward(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        means, flat = self.get_buffer("means"), z.flatten(1)
        variance = self.noise**2 + per_sample(torch.as_tensor(sigma).to(z), flat).square()
        weights = ((flat.unsqueeze(1) - means).square().sum(-1) / (-2 * variance)).softmax(1)
        return ((weights @ means - flat) / variance).reshape(z.shape)


class TurningField(nn.Module):
    """v(z, σ) = c(σ) P (ψ J t + J ∇ψ) of the coordinates y = Pᵀz in a plane, with J a quarter turn.

    If t is the score of y, p v is c P J ∇(p ψ) and has no divergence in the plane, whatever ψ(y, σ) is. If y is also
    independent of the coordinates across the plane, ∇·(p_σ v) = 0. ψ is a constant plus a network with one hidden
    layer, of y in units of √(σ² + τ²) and of log σ. c is 1 within a range of noise levels and fades out over a factor
    of 2 on both sides.

    Args:
        score: t(y, σ).
        basis: P, `[D, 2]`, orthonormal.
        noise: τ, standard deviation of a component at σ = 0.
        low, high: range of σ.
        width: hidden units.

    Shape:
        z `[n, *event]` of D numbers, σ `[]` or `[n]`; returns the shape of z.
    """

    accepts_sigma_per_sample = True

    def __init__(self, score: NoisyField, basis: Tensor, noise: float, low: float, high: float, width: int) -> None:
        super().__init__()
        self.score, self.noise, self.ends = score, noise, (math.log(low), math.log(high))
        self.register_buffer("basis", basis)
        self.frequencies = nn.Parameter(torch.randn(width, 2))
        self.shifts, self.slopes = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.weights = nn.Parameter(0.01 * torch.randn(width))
        self.constant = nn.Parameter(torch.ones(()))

    def in_plane(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the field of the coordinates y `[n, 2]`, of their shape."""
        level = torch.as_tensor(sigma).to(y).expand(len(y)).unsqueeze(1)
        scale, logarithm = (level.square() + self.noise**2).sqrt(), level.log()
        hidden = torch.tanh(y / scale @ self.frequencies.T + self.shifts + logarithm * self.slopes)
        height = (hidden @ self.weights + self.constant).unsqueeze(1)
        gradient = ((1 - hidden.square()) * self.weights) @ self.frequencies / scale
        outside = torch.maximum(self.ends[0] - logarithm, logarithm - self.ends[1])
        fade = (1 - outside.clamp_min(0) / FADE).clamp_min(0)
        return fade * quarter_turn(height * self.score(y, level[:, 0]) + gradient)

    def forward(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        basis = self.get_buffer("basis")
        return (self.in_plane(z.flatten(1) @ basis, sigma) @ basis.T).reshape(z.shape)
