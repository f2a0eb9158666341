"""Workloads of the benchmarks: shapes, bandwidths and data.

A `Case` of `tests/support/cases.py` describes numbers that are hard to get right; a `Workload` how much there is to do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TAU = 1.0


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
class Workload:
    """A density estimate in each of several groups.

    Attributes:
        groups: number of groups.
        queries: points per group where it is evaluated. If as many as reference points, they are these points.
        refs: reference points per group.
        sigma2: σ², as the ops take it.
        make: (groups, points, dimensions, generator) -> reference points.
    """

    name: str
    groups: int
    queries: int
    refs: int
    dimensions: int
    sigma2: float
    make: Callable[[int, int, int, torch.Generator], Tensor] = normal

    @property
    def pairs(self) -> int:
        return self.groups * self.queries * self.refs

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Queries and reference points, `[groups, points, dimensions]` in float32, equal in every process."""
        refs = self.make(self.groups, self.refs, self.dimensions, torch.Generator().manual_seed(0))
        return (refs if self.queries == self.refs else refs[:, : self.queries] + 0.1), refs


TOY = Workload("toy: 256 points, D = 2", 1, 256, 256, 2, 0.2)
GENES = [
    Workload(f"RNA: 2000 genes × 256 cells, σ² = {sigma2}", 2000, 256, 256, 2, sigma2, phase_portraits)
    for sigma2 in (0.001, 0.2)
]
SPRINGS = Workload("springs: 256 points, D = 200", 1, 256, 256, 200, 20.0)
CIFAR = Workload("CIFAR-10: 128 points, D = 3072", 1, 128, 128, 3072, 300.0)
CELEBA = Workload("CelebA-64: 128 points, D = 12288", 1, 128, 128, 12288, 1200.0)
MANY = Workload("many reference points: 256 × 100000, D = 16", 1, 256, 100_000, 16, 1.6)
LARGE = [Workload(f"large: 16384 points, D = {d}", 1, 16384, 16384, d, 0.1 * d) for d in (2, 16)]
FAMILIES = [TOY, *GENES, SPRINGS, CIFAR, CELEBA, MANY, *LARGE]


def _along(what: str, all_sizes: list[tuple[int, int, int, int]]) -> list[Workload]:
    """Workloads named by the size that grows: (groups, queries, reference points, dimensions)."""
    at = {"groups": 0, "points": 1, "reference points": 2, "dimensions": 3}[what]
    return [Workload(f"{what} {sizes[at]}", *sizes, 0.1 * sizes[3]) for sizes in all_sizes]


# By what grows in a row of workloads, with the sizes that stay.
SCALING = {
    "points N = M, D = 2": _along("points", [(1, n, n, 2) for n in (256, 1024, 4096, 16384, 65536)]),
    "reference points M, 256 queries, D = 2": _along(
        "reference points", [(1, 256, m, 2) for m in (1000, 10_000, 100_000, 1_000_000)]
    ),
    "dimensions D, 512 points": _along("dimensions", [(1, 512, 512, d) for d in (2, 8, 16, 24, 64, 256, 1024, 4096)]),
    "groups of 256 points, D = 2": _along("groups", [(g, 256, 256, 2) for g in (1, 8, 64, 512, 4096)]),
}
