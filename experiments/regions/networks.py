"""Network of images of two parts, with or without the right part hidden from the left one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

HIDDEN = 3  # hidden layers of a branch


class PartsNetwork(nn.Module):
    """F(x, c_noise) of `fluxmatching.EDMField` for images of two parts: a perceptron per part, which sees both.

    Under the mask the left branch gets zeros in place of the right part, so that the Jacobian of the left output with
    respect to the right part is exactly zero.

    Args:
        pixels: pixels of a part.
        width: width of the hidden layers.
        masked: whether the left branch does not see the right part.

    Shape:
        x `[n, 2, height, width]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, pixels: int, width: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.left, self.right = _branch(pixels, width), _branch(pixels, width)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        left, right = x.flatten(2).unbind(1)
        level = c_noise.unsqueeze(-1)
        seen = torch.zeros_like(right) if self.masked else right
        parts = self.left(torch.cat([left, seen, level], 1)), self.right(torch.cat([right, left, level], 1))
        return torch.stack(parts, 1).reshape(x.shape)


def _branch(pixels: int, width: int) -> nn.Sequential:
    sizes = (2 * pixels + 1, *([width] * HIDDEN))
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, pixels))
