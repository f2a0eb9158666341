"""RNA velocity: the splicing model fitted by Flux Matching on real cells, beside scVelo's own fits."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.registry import Experiment, UsageError
from experiments.common.run import Figure, Result, Run
from experiments.rna_velocity.datasets import DATASETS


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the paper's (Table 2).

    Args:
        datasets: by name: pancreas, gastrulation, dentate_gyrus, bone_marrow, hindbrain.
        seeds: fits by Flux Matching.
        passes: over all cells.
        batch: cells a minibatch.
        sigma2: σ² of the density estimates.
        learning_rate: of Adam.
        circulating_passes: over all cells, of the fits that start from a circulating field.
        genes: most variable ones that are kept.
        cells: at most so many, chosen at random.
        scvelo: its models to fit beside.
    """

    datasets: tuple[str, ...] = ("pancreas",)
    seeds: int = 5
    passes: int = 100
    batch: int = 256
    sigma2: float = 1e-3
    learning_rate: float = 1e-3
    circulating_passes: int = 20
    genes: int = 2000
    cells: int = 1_000_000
    scvelo: tuple[str, ...] = ("stochastic", "dynamical")

    def __post_init__(self) -> None:
        for name in ("seeds", "passes", "batch", "sigma2", "learning_rate", "circulating_passes", "genes", "cells"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if unknown := set(self.datasets) - set(DATASETS):
            raise ValueError(f"datasets must be among {', '.join(DATASETS)}, got {', '.join(sorted(unknown))}")
        if unknown := set(self.scvelo) - {"stochastic", "dynamical", "deterministic"}:
            raise ValueError(f"scvelo must be among stochastic, dynamical, deterministic, got {sorted(unknown)}")


def run(run: Run) -> None:
    """Fit every data set by every method, judge, draw."""
    try:
        import scvelo  # noqa: F401
    except ImportError as error:
        raise UsageError("rna_velocity needs scVelo: pip install 'fluxkernels[rna]'") from error
    from experiments.rna_velocity import fits, real

    results: list[Result] = []
    shown: list[Figure] = []
    for name in run.config.datasets:
        real.fit_all(run, name)
        results += real.results(run, name)
        shown += real.shown(run, name)
    run.summary(results, shown, [f"Versions: {', '.join(f'{k} {v}' for k, v in fits.versions().items())}."])


EXPERIMENT = Experiment(
    name="rna_velocity",
    title="RNA velocity by Flux Matching beside scVelo",
    paper="Sec. 4.2, B.2, Fig. 5, 8 to 12",
    claim=(
        "The splicing model that scVelo fits by alternating latent times and rates is fitted by Flux Matching instead, "
        "and its velocities are more consistent between neighbouring cells."
    ),
    presets={
        "smoke": Config(seeds=1, passes=2, batch=32, genes=30, cells=100, scvelo=("stochastic",)),
        "small": Config(seeds=2, passes=20, genes=1000, cells=2000, scvelo=("stochastic",)),
        "paper": Config(),
    },
    run=run,
)  # fmt: skip
