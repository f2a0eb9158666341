"""Images of two square parts with a disc in each: the right disc is the mirror image of the left, displaced at random.

A part has 8 × 8 pixels. The left center is uniform on a square; the right center is its mirror image, plus a normal
displacement. So the joint distribution of the centers, `[n, 2 parts, 2 coordinates]`, is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIZE = 8  # pixels of a side of a part
LOW, HIGH = 2.0, 5.0  # range of both coordinates (row, column) of the left center
DISPLACEMENT = 1.0  # standard deviation of both coordinates of the right center about the mirror image
RADIUS, SOFTNESS = 1.6, 0.4  # of a disc and of its edge
STEP = 0.1  # of the grid on which centers are found

CORRELATION = 1 / math.sqrt(1 + 12 * DISPLACEMENT**2 / (HIGH - LOW) ** 2)  # of a center with its mirror image


def mirrored(centers: Tensor) -> Tensor:
    """Mirror centers (row, column) at the line between the parts, `[..., 2]`."""
    row, column = centers.unbind(-1)
    return torch.stack([row, SIZE - 1 - column], -1)


def draw_centers(count: int, generator: torch.Generator) -> Tensor:
    """Draw centers of both discs, `[count, 2, 2]`, float64."""
    left = LOW + (HIGH - LOW) * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    shift = DISPLACEMENT * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return torch.stack([left, mirrored(left) + shift], 1)


def draw_discs(centers: Tensor) -> Tensor:
    """Draw discs with soft edges, near 1 inside and 0 outside: `[..., 2]` to `[..., 8, 8]`."""
    pixel = torch.arange(SIZE).to(centers)
    row, column = centers.unsqueeze(-1).unbind(-2)
    distance = ((pixel - row).square().unsqueeze(-1) + (pixel - column).square().unsqueeze(-2)).sqrt()
    return ((RADIUS - distance) / SOFTNESS).sigmoid()


def draw_images(count: int, generator: torch.Generator) -> Tensor:
    """Draw images, `[count, 2, 8, 8]`, float32."""
    return draw_discs(draw_centers(count, generator)).float()


def find_centers(images: Tensor) -> tuple[Tensor, Tensor]:
    """Find the disc nearest to each part, on a grid of centers.

    Args:
        images: `[n, 2, 8, 8]`.

    Returns:
        Centers `[n, 2, 2]`, float64, and the root mean square difference of pixels from that disc, `[n, 2]`.
    """
    axis = torch.arange(-0.5, SIZE - 0.5 + STEP / 2, STEP, dtype=torch.float64, device=images.device)
    grid = torch.cartesian_prod(axis, axis)
    discs = draw_discs(grid).flatten(1)
    parts = images.double().flatten(2)
    distance = discs.square().sum(1) - 2 * parts @ discs.T
    best = distance.min(-1)
    error = (best.values + parts.square().sum(-1)).clamp_min(0) / SIZE**2
    return grid[best.indices], error.sqrt()


def center_correlation(centers: Tensor) -> float:
    """Correlation of right centers with the mirror images of left ones, mean over both coordinates."""
    expected, found = mirrored(centers[:, 0]), centers[:, 1]
    pairs = zip(expected.unbind(-1), found.unbind(-1), strict=True)
    return sum(torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs) / 2


def displacement(centers: Tensor) -> float:
    """Root mean square of a coordinate of right centers about the mirror images of left ones."""
    return (centers[:, 1] - mirrored(centers[:, 0])).square().mean().sqrt().item()
