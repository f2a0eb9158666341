"""Simulated cells with known velocities and rates, and the errors of every method on them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.results import Figure, Result, spread
from experiments.common.run import Run
from experiments.rna_velocity import figures, fits, measures
from experiments.rna_velocity.preparation import prepare
from experiments.rna_velocity.simulators import (
    COURSES,
    SimulatedCells,
    simulate_network,
    simulate_switches,
    simulate_tree,
)

if TYPE_CHECKING:
    from anndata import AnnData

TREE, NETWORK = "tree", "network"
MEASURES = {
    "cells": "cosine per cell",
    "genes": "cosine per gene",
    "signs": "right signs",
    "ratio": "error of γ/β",
    "time": "pseudotime",
}
BINS = 5  # of cells, by their spread


def simulate(problem: str, noise: float, seed: int, run: Run) -> SimulatedCells:
    """Simulate one set of cells; `problem` is one of `COURSES`, or `TREE` or `NETWORK`, which have no noise level."""
    config = run.config
    if problem == TREE:
        return simulate_tree(seed, config.tree_cells, config.tree_genes, branch_points=2 + seed % 2)
    if problem == NETWORK:
        return simulate_network(seed, config.network_cells, config.network_genes)
    return simulate_switches(seed, problem, noise, config.switch_cells, config.switch_genes)


def problems(run: Run) -> list[tuple[str, float]]:
    """Return (problem, noise level) of all sets."""
    return [*((course, noise) for course in COURSES for noise in run.config.noise), (TREE, 0.0), (NETWORK, 0.0)]


def title(problem: str, noise: float) -> str:
    return problem if problem in (TREE, NETWORK) else f"switches, {problem}, noise {noise:g}"


def fit_all(run: Run) -> None:
    """Simulate, fit and log the methods that are not yet in the run's rows."""
    keys = [(*problem, seed) for problem in problems(run) for seed in range(run.config.simulations)]
    done = {(row["problem"], row["noise"], row["seed"], row["method"]) for row in run.rows("simulated")}
    for problem, noise, seed in run.bar(keys, "simulated cells"):
        missing = [method for method in fits.methods(run) if (problem, noise, seed, method) not in done]
        if not missing:
            continue
        cells = simulate(problem, noise, run.seed + seed, run)
        prepared = cells.to_anndata()
        prepare(prepared, counts=cells.counts)
        for method in missing:
            fitted = prepared.copy()
            seconds = fits.fit(run, fitted, method, run.seed + seed)
            known = {"problem": problem, "noise": noise, "seed": seed, "method": method}
            if "velocity_spread" in fitted.obs:
                for row in calibration(fitted, cells):
                    run.log(kind="calibration", **known, **row)
            run.log(kind="simulated", **known, **measures.errors(fitted, fits.ratio(fitted, method)), seconds=seconds)


def calibration(adata: AnnData, cells: SimulatedCells) -> list[dict[str, float]]:
    """Compare the spread of the flow's direction with its error, in bins of equally many cells by their spread.

    The true flow of the state is that of log1p of the expected abundance along the state's directions.

    Returns:
        One row per bin: "spread" and "error", the mean of 1 - cos with the true flow.
    """
    scale = adata.layers["Ms"].sum(1) / cells.expected_spliced.sum(1)  # size normalization
    true = (cells.velocity * scale[:, None] / (1 + adata.layers["Ms"])) @ adata.varm["velocity_flow"]
    error = 1 - measures.cosine(adata.obsm["velocity_flow"], true, 1)
    stated = adata.obs["velocity_spread"].to_numpy()
    order = np.argsort(stated, kind="stable")
    order = order[np.isfinite(error[order])]
    return [
        {"bin": number, "spread": float(stated[part].mean()), "error": float(error[part].mean())}
        for number, part in enumerate(np.array_split(order, BINS))
    ]


def values(run: Run, problem: str, noise: float, method: str, measure: str) -> list[float]:
    """Values of one measure, one per seed, without those that do not exist."""
    found = run.by_seed("simulated", measure, problem=problem, noise=noise, method=method)
    return [value for value in found if np.isfinite(value)]


def results(run: Run) -> list[Result]:
    """Lines of the summary: one for each problem and method, with the controls beside the shared flow."""
    lines: list[Result] = []
    methods = fits.methods(run)
    controls = [method for method in methods if method in fits.CONTROLS]
    for problem, noise in problems(run):
        for method in methods:
            if method in controls:
                continue
            beside = controls if method == fits.SHARED else []
            passed = None
            if beside:
                own = statistics.mean(values(run, problem, noise, method, "cells"))
                passed = all(own > statistics.mean(values(run, problem, noise, c, "cells")) for c in beside)
            seconds = statistics.median(values(run, problem, noise, method, "seconds"))
            parts = [
                f"{name} {_with_controls(run, problem, noise, (method, *beside), measure)}"
                for measure, name in MEASURES.items()
            ]
            lines.append(
                Result(
                    f"{title(problem, noise)}: {method}{fits.BRACKETS if beside else ''}",
                    f"{'; '.join(parts)}; {seconds:.1f} s",
                    "–",
                    passed,
                )
            )
    return lines


def _with_controls(run: Run, problem: str, noise: float, methods: Sequence[str], measure: str) -> str:
    """Format the first method's values, and the means of the others in brackets."""
    own, *others = (values(run, problem, noise, method, measure) for method in methods)
    beside = [f"{statistics.mean(other):.3f}" if other else "–" for other in others]
    return (spread(own) if own else "–") + (f" [{', '.join(beside)}]" if beside else "")


def shown(run: Run) -> list[Figure]:
    bars, calibrated = run.figure("simulated"), run.figure("calibration")
    names = [title(*problem) for problem in problems(run)]
    panels = {
        MEASURES[measure]: {
            method: [values(run, *problem, method, measure) for problem in problems(run)]
            for method in fits.methods(run)
        }
        for measure in ("cells", "genes", "signs", "ratio", "time")
    }
    figures.draw_simulated(bars, names, panels)
    found = [Figure(bars, "Simulated cells against the truth, by method and control; mean and one point per seed.")]
    rows = run.rows("calibration")
    if rows:
        curves: dict[str, list[tuple[float, float]]] = {}
        for problem, noise in problems(run):
            own = [row for row in rows if (row["problem"], row["noise"]) == (problem, noise)]
            curves[title(problem, noise)] = [(row["spread"], row["error"]) for row in own]
        figures.draw_calibration(calibrated, curves)
        found.append(
            Figure(
                calibrated,
                "Uncertainty: spread of the flow's direction that the method states, against 1 - cosine with the true "
                "flow; one point per fifth of the cells and seed. The line is equality.",
            )
        )
    return found
