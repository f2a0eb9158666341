"""Convolutional network of two parts, with or without the right part hidden from the left one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 6  # the part itself, the other one, its mirror image, the noise level, and two coordinates


class PartsNetwork(nn.Module):
    """F(x, c_noise) of `fluxmatching.EDMField` for images of two parts: a convolutional branch per part.

    A branch has one layer of 5 × 5 and three of 3 × 3, with SiLU between them. It sees its own part, the other part and
    the mirror image of the other part. Under the mask the left branch gets zeros in place of the right part. Then the
    Jacobian of the left output with respect to the right part is exactly zero.

    Args:
        width: channels of the hidden layers.
        masked: whether the left branch does not see the right part.

    Shape:
        x `[n, 2, height, width]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.left, self.right = _branch(width), _branch(width)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        left, right = x[:, :1], x[:, 1:]
        seen = torch.zeros_like(right) if self.masked else right
        level = c_noise[:, None, None, None].expand_as(left)
        rows, columns = (torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        return torch.cat(
            [
                self.left(torch.cat([left, seen, seen.flip(-1), level, place], 1)),
                self.right(torch.cat([right, left, left.flip(-1), level, place], 1)),
            ],
            1,
        )


def _branch(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(CHANNELS, width, 5, padding=2), nn.SiLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))
