"""Simulated cells with known velocities and rates, and the errors of every method on them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.results import Figure, Result, spread
from experiments.common.run import Run
from experiments.rna_velocity import figures, fits

if TYPE_CHECKING:
    from anndata import AnnData

DURATION = 25.0  # length of the simulated course, in units in which rates are near 0.5
# Time at which a gene is switched off, as a fraction of the course: early enough for cells to decay again, or not.
COURSES = {"complete": (0.2, 0.6), "cut short": (0.6, 1.0)}
METRICS = ("cosine", "cosine_kept", "sign", "ratio_error")
DRAWN = {"cosine": "cosine with the truth", "sign": "share of right signs", "ratio_error": "error of γ/β (|log|)"}


def kinetics(
    time: np.ndarray, alpha: float, beta: float, gamma: float, start: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
    """u and s after `time` with constant rates and β ≠ γ: the solution of du/dt = α - β u, ds/dt = β u - γ s."""
    u0, s0 = start
    by_splicing, by_degradation = np.exp(-beta * time), np.exp(-gamma * time)
    unspliced = alpha / beta + (u0 - alpha / beta) * by_splicing
    mixed = (u0 * beta - alpha) / (gamma - beta)
    spliced = alpha / gamma + mixed * by_splicing + (s0 - alpha / gamma - mixed) * by_degradation
    return unspliced, spliced


def simulate(seed: int, noise: float, course: str, cells: int, genes: int) -> AnnData:
    """Simulate cells by scVelo, with their moments and the truth in `layers["true_velocity"]` and `var["true_*"]`.

    Rates are log-normal. The noise is normal and clipped at 0; its standard deviation is `noise` times a tenth of a
    gene's 99th percentile. `cells` must differ from `genes`: scVelo reads as many rates as cells as rates per cell.
    """
    import scanpy as sc
    import scvelo as scv

    generator = np.random.default_rng(seed)
    rates = {
        name: np.exp(generator.normal(np.log(middle), 0.5, genes))
        for name, middle in (("alpha", 5.0), ("beta", 0.5), ("gamma", 0.3))
    }
    switches = list(generator.uniform(*COURSES[course], genes))
    with fits.quiet():
        adata = scv.datasets.simulation(
            n_obs=cells, n_vars=genes, t_max=DURATION, noise_level=noise, switches=switches, random_seed=seed, **rates
        )
        sc.pp.pca(adata, n_comps=min(30, genes - 1), random_state=seed)
        sc.pp.neighbors(adata, n_neighbors=30, random_state=seed)
        scv.pp.moments(adata, n_neighbors=None, n_pcs=None)
    adata.layers["true_velocity"] = true_velocity(adata)
    return adata


def true_velocity(adata: AnnData) -> np.ndarray:
    """ds/dt of the noiseless course, `[cells, genes]`, from the simulation's rates and times."""
    time = adata.obs["true_t"].to_numpy()
    found = np.empty(adata.shape)
    rates = adata.var[["true_t_", "true_alpha", "true_beta", "true_gamma"]].to_numpy()
    for gene, (switch, alpha, beta, gamma) in enumerate(rates):
        at_switch = tuple(float(part[0]) for part in kinetics(np.array([switch]), alpha, beta, gamma))
        rising = kinetics(time, alpha, beta, gamma)
        falling = kinetics(np.maximum(time - switch, 0), 0.0, beta, gamma, (at_switch[0], at_switch[1]))
        unspliced, spliced = np.where(time < switch, rising, falling)
        found[:, gene] = beta * unspliced - gamma * spliced
    return found


def measure(adata: AnnData, ratio: np.ndarray) -> dict[str, float]:
    """Measure errors of `layers["velocity"]` and γ/β against the truth, over the genes for which velocities exist.

    "cosine_kept" is the cosine over the genes in `var["velocity_genes"]`, which a method keeps for later steps.
    Signs are counted only where the true velocity is at least a twentieth of the gene's largest; below that noise
    decides the sign.
    """
    velocity, truth = np.asarray(adata.layers["velocity"], dtype=float), adata.layers["true_velocity"]
    known = np.isfinite(velocity).all(0)
    kept = fits.kept_genes(adata)[known]
    velocity, truth = velocity[:, known], truth[:, known]
    cosines = fits.gene_cosines(velocity, truth)
    moving = np.abs(truth) > np.abs(truth).max(0) / 20
    error = np.log(ratio[known] * (adata.var["true_beta"] / adata.var["true_gamma"]).to_numpy()[known])
    return {
        "cosine": float(cosines.mean()),
        "cosine_kept": float(cosines[kept].mean()),
        "sign": float(np.mean((np.sign(velocity) == np.sign(truth))[moving])),
        "ratio_error": float(np.median(np.abs(error))),
        "ratio_bias": float(np.mean(error)),
        "genes": int(known.sum()),
        "kept": int(kept.sum()),
    }


def fit(run: Run, adata: AnnData, method: str, seed: int) -> tuple[float, np.ndarray]:
    """Fit and write `layers["velocity"]`; returns the seconds it took, and γ/β of every gene."""
    seconds = fits.fit(run, adata, method, seed)
    if method.startswith(fits.FLUX):
        ratio = adata.var["velocity_gamma"] / adata.var["velocity_beta"]
    elif method == "dynamical":
        ratio = adata.var["fit_gamma"] / adata.var["fit_beta"]
    else:
        ratio = adata.var["velocity_gamma"]  # in units of β
    return seconds, ratio.to_numpy()


def methods(run: Run) -> list[str]:
    return [*run.config.scvelo, *fits.FLUX_METHODS]


def fit_all(run: Run) -> None:
    """Simulate, fit and log the methods that are not yet in the run's rows."""
    config = run.config
    keys = [(course, noise, seed) for course in COURSES for noise in config.noise for seed in range(config.simulations)]
    done = {(row["course"], row["noise"], row["seed"], row["method"]) for row in run.rows("simulated")}
    for course, noise, seed in run.bar(keys, "simulated cells"):
        missing = [method for method in methods(run) if (course, noise, seed, method) not in done]
        if not missing:
            continue
        adata = simulate(run.seed + seed, noise, course, config.simulated_cells, config.simulated_genes)
        for method in missing:
            fitted = adata.copy()
            seconds, ratio = fit(run, fitted, method, run.seed + seed)
            known = {"course": course, "noise": noise, "seed": seed, "method": method}
            run.log(kind="simulated", **known, **measure(fitted, ratio), seconds=seconds)


def collected(run: Run, course: str, metric: str) -> dict[str, dict[float, list[float]]]:
    """Values by method and noise, one per seed."""
    rows = [row for row in run.rows("simulated") if row["course"] == course]
    return {
        method: {
            noise: [row[metric] for row in rows if (row["method"], row["noise"]) == (method, noise)]
            for noise in run.config.noise
        }
        for method in methods(run)
    }


def results(run: Run) -> list[Result]:
    """Lines of the summary: one for each course, method and noise level."""
    lines: list[Result] = []
    for course in COURSES:
        values = {metric: collected(run, course, metric) for metric in (*METRICS, "seconds")}
        for method in methods(run):
            for noise in run.config.noise:
                found = {metric: values[metric][method][noise] for metric in values}
                lines.append(
                    Result(
                        f"simulated, {course}, noise {noise:g}, {method}: cosine / of genes kept / signs / γ/β error",
                        " / ".join(spread(found[metric]) for metric in METRICS)
                        + f"; {statistics.median(found['seconds']):.1f} s",
                        "–",
                    )
                )
    return lines


def shown(run: Run) -> list[Figure]:
    path = run.figure("simulated")
    panels = {
        f"{course}: {title}": collected(run, course, metric) for course in COURSES for metric, title in DRAWN.items()
    }
    figures.draw_against_noise(path, panels)
    return [Figure(path, "Simulated cells against the truth; mean and standard deviation over seeds.")]
