"""Fields v that are added to a score s: exact ones with ∇·(p v) = 0, and networks that have to learn it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]


class StreamField(nn.Module):
    """v = Σ_m (ψ_m J_m s + J_m ∇ψ_m) with antisymmetric matrices J_m, so that p v = Σ_m J_m ∇(p ψ_m): ∇·(p v) = 0.

    Whatever the parameters are, v keeps p exactly. Each ψ_m is a constant plus a network with one hidden layer.

    Args:
        score: s(x), exact.
        dim: D.
        scale: typical size of x.
        terms: number of matrices.
        width: hidden units.
    """

    def __init__(self, score: Score, dim: int, scale: float, terms: int, width: int) -> None:
        super().__init__()
        self.score = score
        self.frequencies = nn.Parameter(torch.randn(width, dim) / scale)
        self.shifts = nn.Parameter(torch.randn(width))
        self.weights = nn.Parameter(0.01 * torch.randn(terms, width))
        self.constants = nn.Parameter(torch.ones(terms))
        start = torch.stack([random_rotation(dim) for _ in range(terms)]) / math.sqrt(terms)
        self.matrices = nn.Parameter(start / 2)  # their antisymmetric parts are counted twice below

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.frequencies.T + self.shifts)
        heights = hidden @ self.weights.T + self.constants
        slopes = ((1 - hidden.square()).unsqueeze(1) * self.weights) @ self.frequencies
        turned = heights.unsqueeze(-1) * self.score(x).unsqueeze(1) + slopes
        return turned.flatten(1) @ (self.matrices - self.matrices.mT).mT.flatten(0, 1)  # Σ_m J_m turned_m


class LearnedField(nn.Module):
    """v = B s(x) + g(x, s(x)) with a free matrix B and a network g: nothing makes it keep p but its training.

    It begins as a random rotation of the score, B antisymmetric, since at v = 0 the autocorrelation loss has no slope.

    Args:
        score: s(x), frozen.
        dim: D.
        scale: typical size of x, and of 1/s.
        width: width of the two hidden layers of g; 0 for no g.
    """

    def __init__(self, score: Score, dim: int, scale: float, width: int) -> None:
        super().__init__()
        self.score, self.scale = score, scale
        self.matrix = nn.Parameter(random_rotation(dim))
        self.network = (
            nn.Sequential(
                nn.Linear(2 * dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
            )
            if width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        turned = score @ self.matrix.T
        if self.network is None:
            return turned
        return turned + self.network(torch.cat([x / self.scale, score * self.scale], 1)) / self.scale


class TurnedScore(nn.Module):
    """v = J s with a constant antisymmetric J: ∇·(p v) = 0 for every p.

    Args:
        score: s(x).
        dim: D.
    """

    def __init__(self, score: Score, dim: int) -> None:
        super().__init__()
        self.score = score
        self.matrix = nn.Parameter(random_rotation(dim) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) @ (self.matrix - self.matrix.T).T


def random_rotation(dim: int) -> Tensor:
    """Draw an antisymmetric matrix with |J|² = D, so that Js is as large as s on average, `[D, D]`."""
    normal = torch.randn(dim, dim)
    difference = normal - normal.T
    return difference * (math.sqrt(dim) / difference.norm())
