"""RNA velocity as one shared flow, beside its controls, the paper's fit of single genes, and scVelo."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass

from experiments.common.registry import Experiment, UsageError, check_sizes
from experiments.common.results import Figure, Result
from experiments.common.run import Run
from experiments.rna_velocity.datasets import DATASETS

METHODS = ("shared_flow", "per_gene", "circulating", "scvelo_stochastic", "scvelo_dynamical")


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the paper's (Table 2).

    Args:
        datasets: names of data sets: pancreas, gastrulation_erythroid, dentate_gyrus, bone_marrow, hindbrain,
            pancreas_739, dentate_gyrus_fitted.
        methods: shared_flow (with its two controls), per_gene (the paper's), circulating (per gene from another
            start), scvelo_stochastic, scvelo_dynamical.
        seeds: number of fits per data set, for methods that depend on a seed.
        bootstraps: replicates from which the shared flow estimates its uncertainty.
        permutations: fits to permuted counts in the test of whether velocity applies to a data set, at least 19; 0 for
            no test.
        epochs: passes of per_gene over all cells.
        batch: cells per minibatch of per_gene and circulating.
        sigma: σ of the density estimates of per_gene.
        learning_rate: learning rate of per_gene.
        circulating_iterations: iterations of circulating.
        genes: number of most variable genes to keep.
        cells: largest number of cells, chosen at random.
        simulations: sets of simulated cells for each simulator and noise level; 0 for none.
        noise: noise levels of switched genes, in tenths of a gene's 99th percentile.
        switch_cells, switch_genes: size of each set of switched genes.
        tree_cells, tree_genes: size of each branching tree.
        network_cells, network_genes: size of each regulatory network.
    """

    datasets: tuple[str, ...] = ("pancreas", "pancreas_739", "dentate_gyrus_fitted")
    methods: tuple[str, ...] = METHODS
    seeds: int = 5
    bootstraps: int = 16
    permutations: int = 19
    epochs: int = 100
    batch: int = 256
    sigma: float = math.sqrt(1e-3)
    learning_rate: float = 1e-3
    circulating_iterations: int = 280
    genes: int = 2000
    cells: int = 1_000_000
    simulations: int = 5
    noise: tuple[float, ...] = (0.2, 1.0, 2.0)
    switch_cells: int = 1000
    switch_genes: int = 60
    tree_cells: int = 2000
    tree_genes: int = 500
    network_cells: int = 1000
    network_genes: int = 60

    def __post_init__(self) -> None:
        sizes = {f"{name}_cells": 50 for name in ("switch", "tree", "network")}
        sizes |= {f"{name}_genes": 3 for name in ("switch", "network")}
        check_sizes(
            self, seeds=1, bootstraps=2, epochs=1, batch=2, circulating_iterations=1, genes=2, cells=2, simulations=0,
            permutations=0, noise=0, tree_genes=20, **sizes,
        )  # fmt: skip
        if 0 < self.permutations < 19:
            raise ValueError(f"permutations must be 0 or at least 19, got {self.permutations}")
        if self.simulations and not self.noise:
            raise ValueError("noise must be one or more levels of at least 0, got none")
        if not self.methods:
            raise ValueError(f"methods must be one or more of {', '.join(METHODS)}, got none")
        for name, allowed in (("datasets", tuple(DATASETS)), ("methods", METHODS)):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name} must be among {', '.join(allowed)}, got {', '.join(sorted(unknown))}")


def main(run: Run) -> None:
    """Fit simulated and real cells by every method, measure, draw. Real cells that are not here are reported."""
    _check_installed(run.config.methods)
    from experiments.rna_velocity import fits, real, simulated

    results: list[Result] = []
    shown: list[Figure] = []
    notes = [f"Versions: {', '.join(f'{k} {v}' for k, v in fits.versions().items())}."]
    for name in run.config.datasets:
        try:
            real.fit_all(run, name)
        except UsageError as error:
            if not run.config.simulations:
                raise
            notes.append(f"Left out: {error}.")
            print(notes[-1], file=sys.stderr)
            continue
        results += real.results(run, name)
        shown += real.shown(run, name)
    if run.config.simulations:
        simulated.fit_all(run)
        results += simulated.results(run)
        shown += simulated.shown(run)
    run.summary(results, shown, notes)


def _check_installed(methods: tuple[str, ...]) -> None:
    """Raise UsageError unless the packages that the methods need are there."""
    needed = {"anndata": "rna"} | ({"scvelo": "scvelo"} if any(name.startswith("scvelo") for name in methods) else {})
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"rna_velocity with these methods needs {package}: pip install 'fluxkernels[{extra}]'")


EXPERIMENT = Experiment(
    name="rna_velocity",
    title="RNA velocity as one shared flow",
    paper="Sec. 4.2, B.2, Fig. 5, 8 to 12",
    claim=(
        "One flow of the whole cell state, fitted in seconds, is nearer to the true velocities of simulated cells than "
        "its controls, which do not use the unspliced counts, and agrees better with known transitions of real cells. "
        "The paper's own claim, for fits of single genes: velocities are more consistent than scVelo's."
    ),
    presets={
        "smoke": Config(
            datasets=("pancreas",), methods=("shared_flow", "per_gene", "circulating"), seeds=1, bootstraps=4,
            epochs=2, batch=32, circulating_iterations=6, genes=40, cells=100, simulations=1, noise=(1.0,),
            switch_cells=60, switch_genes=30, tree_cells=80, tree_genes=40, network_cells=60, network_genes=30,
        ),
        "small": Config(datasets=("pancreas",), methods=("shared_flow",), seeds=1, permutations=0, simulations=2),
        "paper": Config(),
    },
    main=main,
)  # fmt: skip
