"""RNA velocity: the splicing model fitted by Flux Matching on real cells, beside scVelo's own fits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.registry import Experiment, UsageError
from experiments.common.run import Figure, Result, Run
from experiments.rna_velocity.datasets import DATASETS, load, preprocess, subsample

if TYPE_CHECKING:
    from anndata import AnnData

# Genes with a known course in the pancreas; other data sets show those that vary most.
PORTRAITS = ("Cpe", "Nnat", "Sulf2", "Top2a", "Pyy", "Gnas")


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
    genes: int = 2000
    cells: int = 1_000_000
    scvelo: tuple[str, ...] = ("stochastic", "dynamical")

    def __post_init__(self) -> None:
        for name in ("seeds", "passes", "batch", "sigma2", "learning_rate", "genes", "cells"):
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
    from experiments.rna_velocity import figures, fits

    results: list[Result] = []
    shown: list[Figure] = []
    for name in run.config.datasets:
        dataset = DATASETS[name]
        methods = [*run.config.scvelo, *([fits.FLUX] * run.config.seeds)]
        seeds = [0] * len(run.config.scvelo) + list(range(run.config.seeds))
        done = {(row["method"], row["seed"]) for row in run.rows("fit") if row["dataset"] == name}
        streams = {m: run.figure(f"{name}-stream-{m}") for m in dict.fromkeys(methods)}
        portraits = run.figure(f"{name}-portraits")
        missing = [pair for pair in zip(methods, seeds, strict=True) if pair not in done]
        if missing:
            prepared = subsample(load(name), run.config.cells, run.seed)
            with fits.quiet():
                preprocess(prepared, dataset, run.config.genes, run.seed)
        for method, seed in missing:
            adata = prepared.copy()
            seconds = fits.fit(run, adata, method, run.seed + seed)
            fits.judge(run, adata, name, dataset, method, seed, seconds)
            if seed == 0:
                with fits.quiet():
                    figures.draw_stream(streams[method], adata, dataset.clusters, f"{name}, {method}")
                if method == fits.FLUX:
                    figures.draw_portraits(portraits, adata, genes_to_show(adata), dataset.clusters)
        metrics = run.figure(f"{name}-metrics")
        figures.draw_metrics(metrics, collected(run, name))
        results += compare(run, name)
        shown += [Figure(streams[m], f"{name}: velocities by {m} on the embedding.") for m in streams]
        shown += [
            Figure(portraits, f"{name}: single genes and the fitted fields du/dt, ds/dt as streams."),
            Figure(metrics, f"{name}: both metrics; a point a seed, and the paper's numbers."),
        ]
    run.summary(results, shown, [f"Versions: {', '.join(f'{k} {v}' for k, v in fits.versions().items())}."])


def genes_to_show(adata: AnnData) -> list[str]:
    """Six genes: those with a known course if they are there, else those whose moments vary most."""
    known = [gene for gene in PORTRAITS if gene in adata.var_names]
    spread = np.asarray(adata.layers["Ms"]).std(0) * np.asarray(adata.layers["Mu"]).std(0)
    others = [gene for gene in adata.var_names[np.argsort(-spread)] if gene not in known]
    return (known + others)[:6]


def of_fits(run: Run, name: str, method: str, column: str) -> list[float]:
    rows = [row for row in run.rows("fit") if (row["dataset"], row["method"]) == (name, method)]
    return [row[column] for row in sorted(rows, key=lambda row: row["seed"])]


def collected(run: Run, name: str) -> dict[str, dict[str, Sequence[float]]]:
    """Metrics by method, the paper's numbers as methods of their own."""
    columns = {"CBC, mean over cells": "over_cells", "CBC, mean over edges": "over_edges", "consistency": "consistency"}
    flux, dynamical = DATASETS[name].paper
    found: dict[str, dict[str, Sequence[float]]] = {}
    for title, column in columns.items():
        paper = 1 if column == "consistency" else 0
        found[title] = {
            **{f"scVelo {m}": of_fits(run, name, m, column) for m in run.config.scvelo},
            "flux": of_fits(run, name, "flux", column),
            "paper: dynamical": [dynamical[paper]],
            "paper: flux": [flux[paper]],
        }
    return found


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def compare(run: Run, name: str) -> list[Result]:
    flux, dynamical = DATASETS[name].paper
    consistency = of_fits(run, name, "flux", "consistency")
    lines = [
        Result(
            f"{name}: consistency, flux ({len(consistency)} seeds)",
            spread(consistency),
            f"{flux[1]} (criterion: at least that, to 0.01)",
            statistics.mean(consistency) >= flux[1] - 0.01,
        ),
        Result(
            f"{name}: CBC, flux, mean over boundary cells / over edges",
            " / ".join(spread(of_fits(run, name, "flux", column)) for column in ("over_cells", "over_edges")),
            f"{flux[0]} (convention not said)",
        ),
    ]
    for method in run.config.scvelo:
        said = f"{dynamical[0]} and {dynamical[1]}" if method == "dynamical" else "–"
        cells, edges, c, seconds = (
            of_fits(run, name, method, column)[0] for column in ("over_cells", "over_edges", "consistency", "seconds")
        )
        lines.append(
            Result(
                f"{name}: scVelo {method}: CBC / consistency, time",
                f"{cells:.3f}, {edges:.3f} / {c:.3f}, {seconds:.0f} s",
                said,
            )
        )
    seconds = statistics.median(of_fits(run, name, "flux", "seconds"))
    lines.append(Result(f"{name}: time of a fit by flux, {run.config.passes} passes", f"{seconds:.0f} s"))
    return lines


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
