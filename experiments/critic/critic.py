"""A network as the test function of the dual of the flux loss: its derivatives in closed form, and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

# How the critic's loss gets E[(f - s)·∇φ]: by parts, from the noise of each sample, or from the density estimate.
BY_PARTS, NOISE, SCORE = FORMS = ("by parts", "noise", "score")


class Critic(nn.Module):
    """Scalar function φ(x): a perceptron with SiLU layers whose derivatives go forward through it.

    Args:
        dim: number of dimensions D.
        width: width of the hidden layers.
        depth: number of hidden layers.
        spread: unit of x.

    Shape:
        x `[n, D]`; returns `[n]`.
    """

    def __init__(self, dim: int, width: int, depth: int, spread: float) -> None:
        super().__init__()
        sizes = (dim, *[width] * depth)
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.last = nn.Linear(width, 1, bias=False)
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.spread
        for layer in self.hidden:
            x = nn.functional.silu(layer(x))
        return self.last(x)[:, 0]

    def gradient(self, x: Tensor) -> Tensor:
        """Return ∇φ, `[n, D]`, detached."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).sum(), x)
        return gradient

    def derivatives(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slopes v_k·∇φ, `[n, K]`, and the sum of v_kᵀ(∇²φ)v_k over k, `[n]`.

        Args:
            x: points, `[n, D]`.
            directions: v, `[K, D]`, or for every point its own, `[n, K, D]`.
        """
        first, *others = [layer for layer in (*self.hidden, self.last) if isinstance(layer, nn.Linear)]
        value, slope = first(x / self.spread), directions @ first.weight.T / self.spread
        curvature = torch.zeros_like(value)
        for layer in others:
            below = torch.sigmoid(value)
            rise = below * (1 + value * (1 - below))
            bend = below * (1 - below) * (2 + value * (1 - 2 * below))
            curvature = (rise * curvature + bend * slope.square().sum(-2)) @ layer.weight.T
            slope = (rise[:, None] * slope) @ layer.weight.T
            value = layer(value * below)
        return slope[..., 0], curvature[:, 0]


def draw_directions(x: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    """Return directions with mean of Σ_k v_k v_kᵀ = I: the D axes for probes = 0, else random signs per point."""
    n, dim = x.shape
    if not probes:
        return torch.eye(dim, dtype=x.dtype)
    signs = torch.randint(2, (n, probes, dim), generator=generator).to(x.dtype)
    return (2 * signs - 1) / math.sqrt(probes)


def critic_loss(critic: Critic, x: Tensor, drift: Tensor, directions: Tensor, *, by_parts: bool) -> Tensor:
    """Compute E|∇φ|² - 2 E[(f - s)·∇φ], which is least, and then -J, where ∇φ is the gradient part of f - s.

    Args:
        critic: φ.
        x: samples of p, `[n, D]`.
        drift: with by_parts f(x), since E[(f - s)·∇φ] = E[f·∇φ + Δφ]; else f - s, or any vectors whose mean given x is
            that, `[n, D]`.
        directions: from `draw_directions`.
        by_parts: whether the score enters by integration by parts.
    """
    slopes, curvature = critic.derivatives(x, directions)
    along = (directions @ drift[:, :, None])[..., 0] if directions.ndim == 3 else drift @ directions.T
    loss = (slopes.square() - 2 * along * slopes).sum(1)
    return (loss - 2 * curvature if by_parts else loss).mean()


def paired_loss(field: Callable[[Tensor], Tensor], x: Tensor, values: Tensor) -> Tensor:
    """Compute 2 E[f·v], whose gradient in f is that of J if v is the gradient part of f - s."""
    return 2 * (field(x) * values).sum(1).mean()
