"""The distribution that a diffusion in the plane keeps, on a grid, and distances between distributions there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.signal import fftconvolve
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu
from torch import Tensor


def stationary_law(field: Callable[[Tensor], Tensor], half_width: float, cells: int) -> tuple[Tensor, Tensor]:
    """Solve for the stationary law of dx = f dt + √2 dW in a square with walls.

    Finite volumes with the fluxes of Scharfetter and Gummel, which are exact between two cells for constant f.

    Returns:
        Probabilities of the cells, `[cells, cells]` float64, and their centers, `[cells², 2]` float32.
    """
    size = 2 * half_width / cells
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) * size - half_width
    index = torch.arange(cells * cells).reshape(cells, cells)
    middle = line[:-1] + size / 2
    with torch.no_grad():
        first = field(torch.cartesian_prod(middle, line).float())[:, 0].double()
        second = field(torch.cartesian_prod(line, middle).float())[:, 1].double()
    peclet = (size * torch.cat([first, second])).clamp(-200, 200)
    below = torch.cat([index[:-1].flatten(), index[:, :-1].flatten()])
    above = torch.cat([index[1:].flatten(), index[:, 1:].flatten()])
    up, down = bernoulli(-peclet), bernoulli(peclet)  # rates from below to above, and back
    rows, columns = torch.cat([above, below, below, above]), torch.cat([below, below, above, above])
    entries = torch.cat([up, -up, down, -down])
    generator = coo_matrix((entries.numpy(), (rows.numpy(), columns.numpy())), (cells**2, cells**2)).tolil()
    # The rates have one null vector; the value of one cell is fixed in place of its equation.
    center = int(index[cells // 2, cells // 2])
    generator[center] = 0
    generator[center, center] = 1
    right = np.zeros(cells**2)
    right[center] = 1
    law = torch.from_numpy(splu(generator.tocsc()).solve(right)).clamp_min(0)
    return (law / law.sum()).reshape(cells, cells), torch.cartesian_prod(line, line).float()


def bernoulli(z: Tensor) -> Tensor:
    """Return z/(e^z - 1), 1 at 0."""
    small = z.abs() < 1e-6
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - z / 2, safe / torch.expm1(safe))


def energy_distance(p: Tensor, q: Tensor, size: float) -> float:
    """Return 2E|X - Y| - E|X - X'| - E|Y - Y'| of two laws on a square grid with cells of that size."""
    cells = len(p)
    steps = np.arange(1 - cells, cells) * size
    lengths = np.hypot(steps[:, None], steps[None])
    difference = (p - q).numpy()
    spread = fftconvolve(difference, lengths, mode="full")[cells - 1 : 2 * cells - 1, cells - 1 : 2 * cells - 1]
    return float(-(difference * spread).sum())
