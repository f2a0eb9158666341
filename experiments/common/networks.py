"""Small networks, shared by several experiments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """F(x, c_noise) of `fluxmatching.EDMField` in few dimensions: three hidden layers.

    Args:
        dim: D.
        width: of the hidden layers.

    Shape:
        x `[n, D]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, dim: int = 2, width: int = 128) -> None:
        super().__init__()
        sizes = (dim + 1, width, width, width)
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None]], 1))
