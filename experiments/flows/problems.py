"""Two problems in the plane: noise to a checkerboard, and two moons to eight Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from experiments.common.run import Run

Sampler = Callable[[int, torch.Generator], Tensor]

MOON_CENTER, MOON_NOISE = (0.5, 0.25), 0.1
RING_RADIUS, RING_STD = 2.5, 0.2


def normal(count: int, generator: torch.Generator) -> Tensor:
    """Draw from N(0, I), `[count, 2]`."""
    return torch.randn(count, 2, generator=generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly from the eight squares of one color on a board of 4 × 4, [-2, 2]², `[count, 2]`."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    return torch.stack([column, row], 1) + torch.rand(count, 2, generator=generator) - 2


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Draw from two interleaved half circles of radius 1 with normal noise, each the other one turned by π."""
    angle = math.pi * torch.rand(count, generator=generator)
    sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    upper = torch.stack([angle.cos(), angle.sin()], 1) - torch.tensor(MOON_CENTER)
    return sign * upper + MOON_NOISE * torch.randn(count, 2, generator=generator)


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Draw from eight equal Gaussians on a circle around 0, `[count, 2]`."""
    angle = math.pi / 4 * torch.arange(8)
    means = RING_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, RING_STD**2).sample(count, generator)


@dataclass(frozen=True)
class Problem:
    """Source and data of a flow.

    Attributes:
        name: name in tables and of files.
        source: draws x0.
        target: draws x1.
    """

    name: str
    source: Sampler
    target: Sampler

    @property
    def from_noise(self) -> bool:
        """Return whether the source is normal noise."""
        return self.source is normal


CHECKERBOARD = Problem("checkerboard", normal, checkerboard)
MOONS = Problem("moons", moons, eight_gaussians)
PROBLEMS = (CHECKERBOARD, MOONS)


def draw(run: Run, sampler: Sampler, count: int, *key: int | str) -> Tensor:
    """Draw samples on the run's device; one key always gives the same ones."""
    return sampler(count, run.generator(*key)).to(run.device)
