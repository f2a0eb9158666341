"""What the benchmarks of the density estimate run on: shapes, bandwidths and data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TAU = 1.0
STEPS = 4


def normal(groups: int, points: int, dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.randn(groups, points, dimensions, generator=generator)


def phase_portraits(groups: int, points: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """Unspliced and spliced counts of cells that switch a gene on and off again, each scaled to [0, 1], with noise.

    RNA velocity's data: u' = α - u, s' = u - γs, each gene with its own γ; every cell is seen at a random time.
    """
    if dimensions != 2:
        raise ValueError("a phase portrait has two dimensions")
    gamma = 0.2 + 0.6 * torch.rand(groups, 1, generator=generator)
    off, time = 4.0, 10 * torch.rand(groups, points, generator=generator)

    def switched_on(t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - (-t).exp(), (1 - (-gamma * t).exp()) / gamma - ((-gamma * t).exp() - (-t).exp()) / (1 - gamma)

    on = switched_on(time)
    # The equations are linear: switching off is switching on with the opposite sign, later.
    late = switched_on((time - off).clamp(min=0))
    counts = torch.stack([a - b for a, b in zip(on, late, strict=True)], -1)
    scaled = counts / counts.amax(1, keepdim=True)
    return scaled + 0.03 * torch.randn(scaled.shape, generator=generator)


@dataclass(frozen=True)
class Case:
    """A density estimate at its own centres: `groups` of `points` each."""

    name: str
    groups: int
    points: int
    dimensions: int
    sigma2: float
    make: Callable[[int, int, int, torch.Generator], Tensor] = normal

    @property
    def pairs(self) -> int:
        return self.groups * self.points**2

    def inputs(self) -> Tensor:
        """`[groups, points, dimensions]` in float32, the same in every process."""
        return self.make(self.groups, self.points, self.dimensions, torch.Generator().manual_seed(0))


GENES = [
    Case(f"2000 genes × 256 cells, D = 2, σ² = {sigma2}", 2000, 256, 2, sigma2, phase_portraits)
    for sigma2 in (0.001, 0.2)
]
SINGLE = [
    Case(f"{points} points, D = {dimensions}, σ² = {0.1 * dimensions:.1f}", 1, points, dimensions, 0.1 * dimensions)
    for points in (4096, 32768)
    for dimensions in (2, 7, 16)
]
MINIBATCHES = [
    Case("minibatch, 256 points, D = 2, σ² = 0.2", 1, 256, 2, 0.2),
    Case("springs, 256 points, D = 200, σ² = 20", 1, 256, 200, 20.0),
    Case("images, 128 points, D = 3072, σ² = 300", 1, 128, 3072, 300.0),
]
CASES = {
    "flux_pass + transition_average": [*GENES, *SINGLE, *MINIBATCHES],
    "kde_score": [*GENES, *SINGLE],
    "kde_log_density": SINGLE,
}
