"""Velocities by Flux Matching and by scVelo, all evaluated in the same way."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.run import Run
from experiments.rna_velocity.datasets import Dataset
from fluxmatching.velocity import (
    CrossBoundaryCorrectness,
    VelocityOptions,
    cross_boundary_correctness,
    flux_velocity,
    velocity_consistency,
)

if TYPE_CHECKING:
    from anndata import AnnData

PROJECTIONS = ("plain", "root")
FLUX = "flux"  # the paper's settings
CIRCULATING_FLUX = "flux circulating"
UNTRAINED = "flux untrained"  # the paper's settings before the first step
CIRCULATING_UNTRAINED = "flux circulating untrained"
FLUX_METHODS = (UNTRAINED, FLUX, CIRCULATING_UNTRAINED, CIRCULATING_FLUX)
STORED = "stored"  # velocities that came with the file


def fit(run: Run, adata: AnnData, method: str, seed: int) -> float:
    """Write the method's velocities to `layers["velocity"]`; returns the seconds it took."""
    begun = time.perf_counter()
    if method.startswith(FLUX):
        fit_flux(run, adata, method, seed)
    elif method != STORED:
        fit_scvelo(adata, method)
    return time.perf_counter() - begun


def fit_flux(run: Run, adata: AnnData, method: str, seed: int) -> None:
    """Fit by one of `FLUX_METHODS`, with the settings of the run."""
    config = run.config
    changes: dict[str, Any] = {"batch_size": config.batch, "seed": seed}
    changes |= {"device": run.device, "backend": run.backend, "progress": run.progress}
    if method in (CIRCULATING_FLUX, CIRCULATING_UNTRAINED):
        preset = "circulating"
        changes["iterations"] = config.circulating_iterations
    else:
        preset = "paper"
        changes |= {"epochs": config.epochs, "sigma": config.sigma, "lr": config.learning_rate}
    if method in (UNTRAINED, CIRCULATING_UNTRAINED):
        changes["iterations"] = 0
    flux_velocity(adata, "per_gene", options=VelocityOptions.from_preset(preset, **changes))


def fit_scvelo(adata: AnnData, mode: str) -> None:
    """Fit by a model of scVelo: "stochastic", "dynamical" or "deterministic"."""
    import scvelo as scv

    with quiet():
        if mode == "dynamical":
            scv.tl.recover_dynamics(adata, var_names="all", n_jobs=1, show_progress_bar=False)
        scv.tl.velocity(adata, mode=mode)


@dataclass(frozen=True)
class Judgment:
    """Metrics of one fit.

    Attributes:
        correctness: cross-boundary correctness for each of `PROJECTIONS`.
        consistency: mean over cells.
        genes: number of genes that the method kept.
        agreement: mean over genes of the cosine with the velocities stored in the file, if it has any.
    """

    correctness: dict[str, CrossBoundaryCorrectness]
    consistency: float
    genes: int
    agreement: float | None


def judge(adata: AnnData, dataset: Dataset) -> Judgment:
    """Project the velocities on the embedding and measure them.

    scVelo's `velocity_graph` compares velocities with differences of cells, either as they are or after sign(x) √|x|.
    By default it takes roots for its stochastic mode only. Here every method is evaluated both ways; `adata` keeps the
    projection by roots.
    """
    import scvelo as scv

    present = set(adata.obs[dataset.clusters].astype(str))  # a small sample may lack some clusters
    edges = [edge for edge in dataset.edges if present.issuperset(edge)]
    found: dict[str, CrossBoundaryCorrectness] = {}
    for projection in PROJECTIONS:
        with quiet():
            scv.tl.velocity_graph(adata, n_jobs=1, show_progress_bar=False, sqrt_transform=projection == "root")
            scv.tl.velocity_embedding(adata, basis="umap")
        found[projection] = cross_boundary_correctness(adata, edges, cluster_key=dataset.clusters)
    return Judgment(
        found,
        float(velocity_consistency(adata).mean()),
        int(kept_genes(adata).sum()),
        agreement(adata) if STORED in adata.layers else None,
    )


def agreement(adata: AnnData) -> float:
    """Mean cosine of a gene's velocities with the stored ones, over genes that both have."""
    velocity, stored = (np.asarray(adata.layers[key], dtype=float) for key in ("velocity", STORED))
    genes = np.isfinite(velocity).all(0) & adata.var[STORED].to_numpy(dtype=bool)
    return float(gene_cosines(velocity[:, genes], stored[:, genes]).mean())


def kept_genes(adata: AnnData) -> np.ndarray:
    """Mask of the genes that a method keeps for later steps; scVelo writes no mask if it keeps all."""
    if "velocity_genes" in adata.var:
        return adata.var["velocity_genes"].to_numpy(dtype=bool)
    return np.ones(adata.n_vars, dtype=bool)


def gene_cosines(velocity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Cosine of each gene's velocities over all cells with the true ones, `[genes]`; 0 where either vanishes."""
    norms = np.linalg.norm(velocity, axis=0) * np.linalg.norm(truth, axis=0)
    return (velocity * truth).sum(0) / np.maximum(norms, 1e-30)


def log(run: Run, judged: Judgment, known: dict[str, Any], seconds: float) -> None:
    """Log one row per edge, and one for the fit, which marks it as done."""
    logged = {row["edge"] for row in run.rows("edge") if known.items() <= row.items()}
    for (source, target), cells in judged.correctness["plain"].cells.items():
        edge = f"{source} → {target}"
        if edge not in logged:
            by_projection = {f"correctness_{key}": c.edges[source, target] for key, c in judged.correctness.items()}
            run.log(kind="edge", **known, edge=edge, cells=cells, **by_projection)
    run.log(
        kind="fit",
        **known,
        **{f"over_cells_{key}": value.mean_over_cells for key, value in judged.correctness.items()},
        **{f"over_edges_{key}": value.mean_over_edges for key, value in judged.correctness.items()},
        consistency=judged.consistency,
        genes=judged.genes,
        agreement=judged.agreement,
        seconds=seconds,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the prints and warnings of scVelo and its libraries: they are many and repeat at every call."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def versions() -> dict[str, Any]:
    """Versions of the libraries, besides our own, that affect the result."""
    from importlib.metadata import version

    return {name: version(name) for name in ("scvelo", "scanpy", "anndata", "numpy", "pandas")}
