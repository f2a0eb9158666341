"""RNA velocity: the splicing model fitted by Flux Matching on real cells, beside scVelo's own fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.common.registry import Experiment, UsageError, check_sizes
from experiments.common.results import Figure, Result
from experiments.common.run import Run
from experiments.rna_velocity.datasets import DATASETS


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the paper's (Table 2).

    Args:
        datasets: names of data sets: pancreas, gastrulation, dentate_gyrus, bone_marrow, hindbrain,
            dentate_gyrus_fitted.
        seeds: number of fits by Flux Matching per data set.
        epochs: passes over all cells.
        batch: cells per minibatch.
        sigma: σ of the density estimates.
        learning_rate: learning rate of Adam.
        circulating_iterations: iterations of the fits that start from a circulating field.
        genes: number of most variable genes to keep.
        cells: largest number of cells, chosen at random.
        scvelo: models of scVelo to compare with.
        simulations: sets of simulated cells for each course and noise level; 0 for none.
        noise: noise levels, in tenths of a gene's 99th percentile.
        simulated_cells, simulated_genes: size of each set.
    """

    datasets: tuple[str, ...] = ("pancreas", "dentate_gyrus_fitted")
    seeds: int = 5
    epochs: int = 100
    batch: int = 256
    sigma: float = math.sqrt(1e-3)
    learning_rate: float = 1e-3
    circulating_iterations: int = 280
    genes: int = 2000
    cells: int = 1_000_000
    scvelo: tuple[str, ...] = ("stochastic", "dynamical")
    simulations: int = 5
    noise: tuple[float, ...] = (0.2, 1.0, 2.0)
    simulated_cells: int = 1000
    simulated_genes: int = 60

    def __post_init__(self) -> None:
        check_sizes(
            self, seeds=1, epochs=1, batch=2, circulating_iterations=1, genes=2, cells=2, simulations=0,
            simulated_genes=3, simulated_cells=self.simulated_genes + 1, noise=0,
        )  # fmt: skip
        if self.simulations and not (self.noise and min(self.noise) >= 0):
            raise ValueError(f"noise must be one or more levels of at least 0, got {self.noise}")
        if unknown := set(self.datasets) - set(DATASETS):
            raise ValueError(f"datasets must be among {', '.join(DATASETS)}, got {', '.join(sorted(unknown))}")
        if unknown := set(self.scvelo) - {"stochastic", "dynamical", "deterministic"}:
            raise ValueError(f"scvelo must be among stochastic, dynamical, deterministic, got {sorted(unknown)}")


def main(run: Run) -> None:
    """Fit every data set by every method, evaluate, draw."""
    try:
        import scvelo  # noqa: F401
    except ImportError as error:
        raise UsageError("rna_velocity needs scVelo: pip install 'fluxkernels[rna]'") from error
    from experiments.rna_velocity import fits, real, simulated

    results: list[Result] = []
    shown: list[Figure] = []
    for name in run.config.datasets:
        real.fit_all(run, name)
        results += real.results(run, name)
        shown += real.shown(run, name)
    if run.config.simulations:
        simulated.fit_all(run)
        results += simulated.results(run)
        shown += simulated.shown(run)
    run.summary(results, shown, [f"Versions: {', '.join(f'{k} {v}' for k, v in fits.versions().items())}."])


EXPERIMENT = Experiment(
    name="rna_velocity",
    title="RNA velocity by Flux Matching beside scVelo",
    paper="Sec. 4.2, B.2, Fig. 5, 8 to 12",
    claim=(
        "scVelo fits its splicing model by alternating between latent times and rates. Fitted by Flux Matching "
        "instead, its velocities are more consistent between neighboring cells."
    ),
    presets={
        "smoke": Config(
            datasets=("pancreas",), seeds=1, epochs=2, batch=32, circulating_iterations=6, genes=30, cells=100,
            scvelo=("stochastic",), simulations=1, noise=(1.0,), simulated_cells=60, simulated_genes=8,
        ),
        "small": Config(
            seeds=2, epochs=20, genes=1000, cells=2000, scvelo=("stochastic",), simulations=3, simulated_genes=30,
        ),
        "paper": Config(),
    },
    main=main,
)  # fmt: skip
