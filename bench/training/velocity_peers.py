"""RNA velocity by the shared flow, its controls and other programs: errors, agreement with each other, and time.

python -m venv peers && peers/bin/pip install torch==2.13.0
peers/bin/pip install -r bench/training/velocity-peers.txt lightning-fabric matplotlib tqdm
peers/bin/python -m bench.training.velocity_peers            about an hour, one thread

It needs the file of the pancreas, see experiments/rna_velocity/README.md. A program that is not installed is left out;
the result reports it. Times are CPU seconds of one thread, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.training.results import begin
from experiments.rna_velocity import fits, measures
from experiments.rna_velocity.datasets import DATASETS, load, preprocess
from experiments.rna_velocity.preparation import dense, prepare
from experiments.rna_velocity.projection import project
from experiments.rna_velocity.simulators import SimulatedCells, simulate_network, simulate_switches, simulate_tree
from fluxmatching.velocity import SharedFlowOptions, cross_boundary_correctness, flux_velocity, velocity_consistency

if TYPE_CHECKING:
    from anndata import AnnData

RUST, VELOVI = "scvelo-rs dynamical", "veloVI"
# The package that each method needs besides this library.
PACKAGES = {
    fits.SHARED: None, fits.WITHOUT: None, fits.PERMUTED: None, f"{fits.SCVELO}stochastic": "scvelo",
    f"{fits.SCVELO}dynamical": "scvelo", RUST: "scvelo_rs", VELOVI: "scvi",
}  # fmt: skip
SIMULATIONS: dict[str, Callable[[int], SimulatedCells]] = {
    "switches, complete": lambda seed: simulate_switches(seed, "complete", 1.0, 1000, 60),
    "switches, cut short": lambda seed: simulate_switches(seed, "cut short", 1.0, 1000, 60),
    "tree": lambda seed: simulate_tree(seed, 2000, 500, branch_points=2 + seed % 2),
    "network": lambda seed: simulate_network(seed, 1000, 60),
}
COLUMNS = {"cells": "cosine per cell", "genes": "cosine per gene", "signs": "right signs", "ratio": "error of γ/β"}
SEEDS = {VELOVI: 1}  # it takes minutes
SAMPLES = 25  # of veloVI's posterior, as in its own tutorial


@dataclass
class Outcome:
    """Values of one method on one problem, one entry per seed.

    Attributes:
        values: by measure.
        seconds: CPU time.
        velocities: layers, for the agreement with other methods.
    """

    values: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    velocities: list[np.ndarray] = field(default_factory=list)


def fit(adata: AnnData, method: str, seed: int) -> np.ndarray:
    """Write `layers["velocity"]`; returns γ/β, NaN where the method has none."""
    if method == fits.SHARED:
        flux_velocity(adata, options=SharedFlowOptions(bootstraps=0, seed=seed))
    elif method in fits.CONTROLS:
        fits.fit_control(adata, method, seed)
    elif method == VELOVI:
        return fit_velovi(adata, seed)
    elif method == RUST:
        import scvelo as scv
        import scvelo_rs

        scvelo_rs.recover_dynamics(adata, var_names="all")
        scv.tl.velocity(adata, mode="dynamical")
        return fits.ratio(adata, f"{fits.SCVELO}dynamical")
    else:
        fits.fit_scvelo(adata, method.removeprefix(fits.SCVELO))
    return fits.ratio(adata, method)


def fit_velovi(adata: AnnData, seed: int) -> np.ndarray:
    """Fit veloVI as its authors' tutorial does: moments scaled to [0, 1], genes with R² > 0, velocities over time 20.

    Gayoso et al., Nature Methods 2023; the model of scvi-tools with its default settings.
    """
    import scvi
    from scvi import external

    scvi.settings.seed = seed
    s, u = dense(adata.layers["Ms"]), dense(adata.layers["Mu"])
    range_s, range_u = np.ptp(s, 0), np.ptp(u, 0)
    slope = (u * s).sum(0) / np.maximum((s * s).sum(0), 1e-12)
    r2 = 1 - ((u - slope * s) ** 2).sum(0) / np.maximum(((u - u.mean(0)) ** 2).sum(0), 1e-12)
    genes = (r2 > 0) & (range_s > 0) & (range_u > 0)
    scaled = adata[:, genes].copy()
    scaled.layers["Ms"] = ((s - s.min(0)) / np.maximum(range_s, 1e-12))[:, genes].astype(np.float32)
    scaled.layers["Mu"] = ((u - u.min(0)) / np.maximum(range_u, 1e-12))[:, genes].astype(np.float32)
    external.VELOVI.setup_anndata(scaled, spliced_layer="Ms", unspliced_layer="Mu")
    model = external.VELOVI(scaled)
    model.train(accelerator="cpu", enable_progress_bar=False)
    times = np.asarray(model.get_latent_time(n_samples=SAMPLES))
    velocity = np.asarray(model.get_velocity(n_samples=SAMPLES, velo_statistic="mean"))
    velocity = velocity / (20 / np.maximum(times.max(0), 1e-12))
    rates = model.get_rates()
    layer, ratio = np.full(adata.shape, np.nan), np.full(adata.n_vars, np.nan)
    layer[:, genes] = velocity * range_s[genes]
    ratio[genes] = rates["gamma"] / rates["beta"] * range_u[genes] / range_s[genes]
    adata.layers["velocity"], adata.var["velocity_genes"] = layer, genes
    return ratio


def run(prepared: AnnData, method: str, seed: int, outcome: Outcome, file: Path | None) -> tuple[AnnData, np.ndarray]:
    """Fit a copy, or read the fit from its file, and keep its time and velocities."""
    adata = prepared.copy()
    if file is not None and file.exists():
        with np.load(file) as stored:
            velocity, genes, ratio = stored["velocity"], stored["genes"], stored["ratio"]
            seconds = float(stored["seconds"])
        adata.layers["velocity"], adata.var["velocity_genes"] = velocity, genes
    else:
        before = time.process_time()
        with fits.quiet():
            ratio = fit(adata, method, seed)
        seconds = time.process_time() - before
        velocity = dense(adata.layers["velocity"])
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, velocity=velocity, genes=fits.kept_genes(adata), ratio=ratio, seconds=seconds)
    outcome.seconds.append(seconds)
    outcome.velocities.append(np.where(np.isfinite(velocity).all(0), velocity, np.nan))
    return adata, ratio


def stored_file(folder: Path | None, problem: str, method: str, seed: int) -> Path | None:
    return None if folder is None else folder / f"{problem}-{method}-{seed}.npz".replace(" ", "-").replace(",", "")


def on_simulation(problem: str, methods: Sequence[str], seeds: int, folder: Path | None) -> dict[str, Outcome]:
    """Measure methods against the truth."""
    outcomes = {method: Outcome() for method in methods}
    for seed in range(seeds):
        cells = SIMULATIONS[problem](seed)
        prepared = cells.to_anndata()
        prepare(prepared, counts=cells.counts)
        for method in methods:
            if seed >= SEEDS.get(method, seeds):
                continue
            file = stored_file(folder, problem, method, seed)
            adata, ratio = run(prepared, method, seed, outcomes[method], file)
            outcomes[method].values.append(measures.errors(adata, ratio))
            print(method, seed, outcomes[method].values[-1], f"{outcomes[method].seconds[-1]:.1f} s", flush=True)
    return outcomes


def on_pancreas(methods: Sequence[str], folder: Path | None) -> dict[str, Outcome]:
    """Measure methods by known transitions; no truth is known."""
    dataset = DATASETS["pancreas"]
    prepared = load("pancreas")
    preprocess(prepared, dataset, 2000, 0)
    outcomes = {method: Outcome() for method in methods}
    for method in methods:
        adata, _ = run(prepared, method, 0, outcomes[method], stored_file(folder, "pancreas", method, 0))
        found: dict[str, float] = {"consistency": float(np.nanmean(velocity_consistency(adata)))}
        for root in (False, True):
            project(adata, "umap", root=root)
            correct = cross_boundary_correctness(adata, dataset.edges, cluster_key=dataset.clusters)
            found |= {f"cells_{root}": correct.mean_over_cells, f"edges_{root}": correct.mean_over_edges}
        outcomes[method].values.append(found)
        print(method, found, f"{outcomes[method].seconds[-1]:.1f} s", flush=True)
    return outcomes


def agreement(one: Outcome, other: Outcome) -> float:
    """Mean over cells and seeds of the cosine of two methods' velocities, over the genes that both have."""
    found = []
    for a, b in zip(one.velocities, other.velocities, strict=False):  # one may have fewer seeds
        genes = np.isfinite(a).all(0) & np.isfinite(b).all(0)
        found.append(np.nanmean(measures.cosine(a[:, genes], b[:, genes], 1)))
    return float(np.mean(found))


def write_agreement(write: Callable[[str], None], outcomes: dict[str, Outcome]) -> None:
    write("| agreement: cosine per cell | " + " | ".join(outcomes) + " |\n|---" + "|---" * len(outcomes) + "|")
    for name, one in outcomes.items():
        write(f"| {name} | " + " | ".join(f"{agreement(one, other):.2f}" for other in outcomes.values()) + " |")
    write("")


def mean_and_spread(values: Sequence[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "–"
    return f"{statistics.mean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def write_simulation(write: Callable[[str], None], name: str, outcomes: dict[str, Outcome], seeds: int) -> None:
    write(f"## {name}, {seeds} seeds\n")
    write(f"| method | {' | '.join(COLUMNS.values())} | pseudotime | CPU time |\n" + "|---" * (len(COLUMNS) + 3) + "|")
    for method, outcome in outcomes.items():
        cells = [mean_and_spread([v[key] for v in outcome.values]) for key in (*COLUMNS, "time")]
        fewer = f" ({len(outcome.values)} seed)" if len(outcome.values) < seeds else ""
        write(f"| {method}{fewer} | {' | '.join(cells)} | {statistics.median(outcome.seconds):.1f} s |")
    write("")


def write_pancreas(write: Callable[[str], None], outcomes: dict[str, Outcome]) -> None:
    write("## pancreas, 3696 cells, 2000 genes\n")
    write("| method | CBC over cells / edges, as they are | by square roots | consistency | CPU time |")
    write("|---" * 5 + "|")
    for method, outcome in outcomes.items():
        v = outcome.values[0]
        plain, root = (f"{v[f'cells_{key}']:.3f} / {v[f'edges_{key}']:.3f}" for key in (False, True))
        write(f"| {method} | {plain} | {root} | {v['consistency']:.3f} | {outcome.seconds[0]:.1f} s |")
    write("")


def versions(methods: Sequence[str]) -> str:
    from importlib.metadata import version

    names = {"scvelo_rs": "scvelo-rs", "scvi": "scvi-tools"}
    packages = {"anndata", "numpy"} | {names.get(p, p) for p in map(PACKAGES.get, methods) if p is not None}
    return ", ".join(f"{name} {version(name)}" for name in sorted(packages))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.training.velocity_peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each simulation; with fewer than 3 nothing is kept")
    parser.add_argument("--methods", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--problems", nargs="+", choices=[*SIMULATIONS, "pancreas"], default=[*SIMULATIONS, "pancreas"])
    parser.add_argument("--fits", type=Path, metavar="FOLDER", help="fits are kept there, and read when they exist")
    options = parser.parse_args()
    torch.set_num_threads(1)
    needed: dict[str, Any] = {method: PACKAGES[method] for method in options.methods}
    missing = {m: p for m, p in needed.items() if p is not None and importlib.util.find_spec(p) is None}
    methods = [method for method in options.methods if method not in missing]
    keep = (
        options.seeds >= 3 and len(options.methods) == len(PACKAGES) and len(options.problems) == len(SIMULATIONS) + 1
    )
    with begin("velocity-peers", torch.device("cpu"), keep=keep) as write:
        write("# RNA velocity: other programs and controls\n")
        write(f"{versions(methods)}. Controls do not know the unspliced counts of a cell.\n")
        for method, package in missing.items():
            write(f"{method} is left out: {package} is not installed.\n")
        for name in options.problems:
            if name == "pancreas":
                outcomes = on_pancreas(methods, options.fits)
                write_pancreas(write, outcomes)
            else:
                outcomes = on_simulation(name, methods, options.seeds, options.fits)
                write_simulation(write, name, outcomes, options.seeds)
            write_agreement(write, outcomes)


if __name__ == "__main__":
    # One thread for every library, set before the first call starts a pool.
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    main()
