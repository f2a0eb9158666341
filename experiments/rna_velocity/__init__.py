"""RNA velocity: the splicing model fitted by Flux Matching on real cells, beside scVelo's own fits."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.registry import Experiment, UsageError, check_sizes
from experiments.common.run import Figure, Result, Run
from experiments.rna_velocity.datasets import DATASETS


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the paper's (Table 2).

    Args:
        datasets: by name: pancreas, gastrulation, dentate_gyrus, bone_marrow, hindbrain, dentate_gyrus_fitted.
        seeds: fits by Flux Matching.
        passes: over all cells.
        batch: cells a minibatch.
        sigma2: σ² of the density estimates.
        learning_rate: of Adam.
        circulating_iterations: of the fits that start from a circulating field.
        genes: most variable ones that are kept.
        cells: at most so many, chosen at random.
        scvelo: its models to fit beside.
        simulations: sets of simulated cells for each course and level of noise; 0 for none.
        noise: its levels, in tenths of a gene's 99th percentile.
        simulated_cells, simulated_genes: of each set.
    """

    datasets: tuple[str, ...] = ("pancreas", "dentate_gyrus_fitted")
    seeds: int = 5
    passes: int = 100
    batch: int = 256
    sigma2: float = 1e-3
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
            self, seeds=1, passes=1, batch=2, circulating_iterations=1, genes=2, cells=2, simulations=0,
            simulated_genes=3, simulated_cells=self.simulated_genes + 1, noise=0,
        )  # fmt: skip
        if self.simulations and not (self.noise and min(self.noise) >= 0):
            raise ValueError(f"noise must be one or more levels of at least 0, got {self.noise}")
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
        "The splicing model that scVelo fits by alternating latent times and rates is fitted by Flux Matching instead, "
        "and its velocities are more consistent between neighbouring cells."
    ),
    presets={
        "smoke": Config(
            datasets=("pancreas",), seeds=1, passes=2, batch=32, circulating_iterations=6, genes=30, cells=100,
            scvelo=("stochastic",), simulations=1, noise=(1.0,), simulated_cells=60, simulated_genes=8,
        ),
        "small": Config(
            seeds=2, passes=20, genes=1000, cells=2000, scvelo=("stochastic",), simulations=3, simulated_genes=30,
        ),
        "paper": Config(),
    },
    run=run,
)  # fmt: skip
