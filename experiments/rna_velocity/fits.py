"""Velocities by every method, and their measures on real cells."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.run import Run
from experiments.rna_velocity import measures
from experiments.rna_velocity.datasets import Dataset
from experiments.rna_velocity.preparation import dense, normalize_totals
from experiments.rna_velocity.projection import project
from fluxmatching.velocity import (
    CrossBoundaryCorrectness,
    SharedFlowOptions,
    VelocityOptions,
    control_with_permuted_unspliced,
    control_without_unspliced,
    cross_boundary_correctness,
    flux_velocity,
    velocity_consistency,
)

if TYPE_CHECKING:
    from anndata import AnnData

SHARED = "shared flow"
WITHOUT, PERMUTED = "control without unspliced", "control with permuted unspliced"
CONTROLS = (WITHOUT, PERMUTED)
BRACKETS = " [without unspliced, permuted]"  # what brackets beside the shared flow's numbers hold
PAPER, PAPER_START = "per gene", "per gene untrained"  # the paper's settings, and the same before the first step
CIRCULATING, CIRCULATING_START = "per gene circulating", "per gene circulating untrained"
STORED = "stored"  # velocities that came with the file
SCVELO = "scVelo "  # followed by the mode
# What each entry of `Config.methods` stands for; a control comes with its method.
METHODS: dict[str, tuple[str, ...]] = {
    "shared_flow": (SHARED, *CONTROLS),
    "per_gene": (PAPER_START, PAPER),
    "circulating": (CIRCULATING_START, CIRCULATING),
    "scvelo_stochastic": (f"{SCVELO}stochastic",),
    "scvelo_dynamical": (f"{SCVELO}dynamical",),
}
DEPEND_ON_SEED = (SHARED, PERMUTED, PAPER, CIRCULATING)
# Ways to compare velocities with differences of cells: as they are, by square roots, and as in the paper's program,
# by square roots on the genes of scVelo's stochastic mode.
PROJECTIONS = ("plain", "root", "published")


def methods(run: Run) -> list[str]:
    """Return the names of the methods that a run compares."""
    return [name for group in run.config.methods for name in METHODS[group]]


def fit(run: Run, adata: AnnData, method: str, seed: int) -> float:
    """Write the method's velocities to `layers["velocity"]`; returns the seconds it took."""
    begun = time.perf_counter()
    with quiet():
        if method == SHARED:
            flux_velocity(adata, options=SharedFlowOptions(bootstraps=run.config.bootstraps, seed=seed))
        elif method in CONTROLS:
            fit_control(adata, method, seed)
        elif method.startswith(SCVELO):
            fit_scvelo(adata, method.removeprefix(SCVELO))
        elif method != STORED:
            fit_per_gene(run, adata, method, seed)
    return time.perf_counter() - begun


def fit_control(adata: AnnData, method: str, seed: int) -> None:
    """Write the velocities of a control, with the shared flow's choice of genes for later steps."""
    control_without_unspliced(adata, vkey="velocity")
    if method == PERMUTED:
        genes = adata.var["velocity_genes"]  # permuted counts would choose others, or none
        options = SharedFlowOptions(bootstraps=0, seed=seed)
        control_with_permuted_unspliced(adata, seed, options=options, vkey="velocity")
        adata.var["velocity_genes"] = genes


def fit_per_gene(run: Run, adata: AnnData, method: str, seed: int) -> None:
    """Fit the paper's model of single genes with the settings of the run."""
    config = run.config
    changes: dict[str, Any] = {"batch_size": config.batch, "seed": seed}
    changes |= {"device": run.device, "backend": run.backend, "progress": run.progress}
    if method in (CIRCULATING, CIRCULATING_START):
        preset, changes["iterations"] = "circulating", config.circulating_iterations
    else:
        # The paper's program keeps the last, smaller minibatch of an epoch.
        preset, per_epoch = "paper", math.ceil(adata.n_obs / config.batch)
        changes |= {"iterations": config.epochs * per_epoch, "sigma": config.sigma, "lr": config.learning_rate}
    if method in (PAPER_START, CIRCULATING_START):
        changes["iterations"] = 0
    flux_velocity(adata, "per_gene", options=VelocityOptions.from_preset(preset, **changes))


def fit_scvelo(adata: AnnData, mode: str) -> None:
    """Fit by a model of scVelo: "stochastic" or "dynamical". Layers of counts become size-normalized ones first."""
    import scvelo as scv

    for key in ("spliced", "unspliced"):
        layer = dense(adata.layers[key])
        if (layer == np.round(layer)).all():
            adata.layers[key] = normalize_totals(layer).astype(np.float32)
    if mode == "dynamical":
        scv.tl.recover_dynamics(adata, var_names="all", n_jobs=1, show_progress_bar=False)
    scv.tl.velocity(adata, mode=mode)


def ratio(adata: AnnData, method: str) -> np.ndarray:
    """Return γ/β of every gene after a fit, NaN where the method has none."""
    if method == f"{SCVELO}dynamical":
        found = adata.var["fit_gamma"] / adata.var["fit_beta"]
    elif method.startswith(SCVELO):
        found = adata.var["velocity_gamma"]  # in units of β
    elif method == WITHOUT:
        return np.full(adata.n_vars, np.nan)
    else:
        found = adata.var["velocity_gamma"] / adata.var["velocity_beta"]
    return found.to_numpy(dtype=float)


@dataclass(frozen=True)
class Judgment:
    """Measures of one fit on real cells.

    Attributes:
        correctness: cross-boundary correctness for each of `PROJECTIONS`.
        consistency: mean over cells, as scVelo's velocity confidence.
        published_consistency: as in the paper's program.
        genes: number of genes that the method kept.
        spread: mean over cells of the spread of directions, if the method has one.
        agreement: mean over genes of the cosine with the velocities stored in the file, if it has any.
    """

    correctness: dict[str, CrossBoundaryCorrectness]
    consistency: float
    published_consistency: float
    genes: int
    spread: float | None
    agreement: float | None


def judge(adata: AnnData, dataset: Dataset) -> Judgment:
    """Project the velocities on the embedding and measure them; `adata` keeps the projection of `PROJECTIONS[0]`."""
    present = set(adata.obs[dataset.clusters].astype(str))  # a small sample may lack some clusters
    edges = [edge for edge in dataset.edges if present.issuperset(edge)]
    found: dict[str, CrossBoundaryCorrectness] = {}
    for projection in reversed(PROJECTIONS):
        genes = measures.published_genes(adata) if projection == "published" else None
        project(adata, "umap", root=projection != "plain", genes=genes)
        found[projection] = cross_boundary_correctness(adata, edges, cluster_key=dataset.clusters)
    return Judgment(
        found,
        float(np.nanmean(velocity_consistency(adata))),
        measures.published_consistency(adata),
        int(kept_genes(adata).sum()),
        float(adata.obs["velocity_spread"].mean()) if "velocity_spread" in adata.obs else None,
        agreement(adata) if STORED in adata.layers else None,
    )


def agreement(adata: AnnData) -> float:
    """Mean cosine of a gene's velocities with the stored ones, over genes that both have."""
    velocity, stored = (dense(adata.layers[key]) for key in ("velocity", STORED))
    genes = np.isfinite(velocity).all(0) & adata.var[STORED].to_numpy(dtype=bool)
    return float(np.nan_to_num(measures.cosine(velocity[:, genes], stored[:, genes], 0)).mean())


def kept_genes(adata: AnnData) -> np.ndarray:
    """Mask of the genes that a method keeps for later steps; scVelo writes no mask if it keeps all."""
    if "velocity_genes" in adata.var:
        return adata.var["velocity_genes"].to_numpy(dtype=bool)
    return np.ones(adata.n_vars, dtype=bool)


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
        published_consistency=judged.published_consistency,
        genes=judged.genes,
        spread=judged.spread,
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
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("anndata", "numpy", "scipy", "pandas", "scanpy", "scvelo"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
