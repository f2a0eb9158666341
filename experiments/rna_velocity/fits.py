"""Velocities by Flux Matching and by scVelo, each judged and drawn the same way."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.common.run import Run
from experiments.rna_velocity.datasets import Dataset
from fluxmatching.velocity import flux_velocity
from fluxmatching.velocity_metrics import cross_boundary_correctness, velocity_consistency

if TYPE_CHECKING:
    from anndata import AnnData

FLUX = "flux"


def fit(run: Run, adata: AnnData, method: str, seed: int) -> float:
    """Write the method's velocities to `layers["velocity"]` of a copy's layers; returns the seconds it took."""
    import scvelo as scv

    begun = time.perf_counter()
    if method == FLUX:
        flux_velocity(
            adata,
            passes=run.config.passes,
            batch_size=run.config.batch,
            sigma2=run.config.sigma2,
            lr=run.config.learning_rate,
            seed=seed,
            device=run.device,
            backend=run.backend,
            progress=run.progress,
        )
    else:
        with quiet():
            if method == "dynamical":
                scv.tl.recover_dynamics(adata, var_names="all", n_jobs=1, show_progress_bar=False)
            scv.tl.velocity(adata, mode=method)
    return time.perf_counter() - begun


def judge(run: Run, adata: AnnData, name: str, dataset: Dataset, method: str, seed: int, seconds: float) -> None:
    """Project the velocities on the embedding, and log both metrics: a row for the fit, and one for each edge."""
    import scvelo as scv

    with quiet():
        scv.tl.velocity_graph(adata, n_jobs=1, show_progress_bar=False)
        scv.tl.velocity_embedding(adata, basis="umap")
    known = {"dataset": name, "method": method, "seed": seed}
    present = set(adata.obs[dataset.clusters].astype(str))  # few cells need not be of all clusters
    edges = [edge for edge in dataset.edges if present.issuperset(edge)]
    correctness = cross_boundary_correctness(adata, edges, cluster_key=dataset.clusters)
    logged = {row["edge"] for row in run.rows("edge") if all(row[key] == value for key, value in known.items())}
    for (source, target), value in correctness.edges.items():
        edge = f"{source} → {target}"
        if edge not in logged:
            run.log(kind="edge", **known, edge=edge, correctness=value, cells=correctness.cells[source, target])
    run.log(
        kind="fit",
        **known,
        over_cells=correctness.mean_over_cells,
        over_edges=correctness.mean_over_edges,
        consistency=float(velocity_consistency(adata).mean()),
        genes=int(adata.var["velocity_genes"].sum()),
        seconds=seconds,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the prints and warnings of scVelo and its libraries, which are many and the same every time."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def versions() -> dict[str, Any]:
    """Of the libraries that decide on the result beside our own."""
    from importlib.metadata import version

    return {name: version(name) for name in ("scvelo", "scanpy", "anndata", "numpy", "pandas")}
