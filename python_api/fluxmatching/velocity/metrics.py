"""Metrics of velocities: agreement with known transitions between clusters, and with neighbors (Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class CrossBoundaryCorrectness:
    """Result of `cross_boundary_correctness`; all numbers in [-1, 1].

    Attributes:
        edges: mean over the boundary cells of each edge, by (source, target).
        cells: number of boundary cells of each edge.
        mean_over_edges: mean of `edges`: every transition has the same weight.
        mean_over_cells: mean over the boundary cells of all edges together: large clusters have more weight.
    """

    edges: dict[tuple[str, str], float]
    cells: dict[tuple[str, str], int]
    mean_over_edges: float
    mean_over_cells: float


def cross_boundary_correctness(
    adata: AnnData,
    edges: Iterable[tuple[str, str]],
    *,
    cluster_key: str = "clusters",
    vkey: str = "velocity",
    basis: str = "umap",
) -> CrossBoundaryCorrectness:
    """Measure whether cells at a boundary move across it: cos(v_i, y_j - y_i) for cells i and neighbors j beyond it.

    A boundary cell of an edge (A, B) is one of A with at least one neighbor in B. Its value is the mean over those
    neighbors; positions y and velocities v are those of an embedding.

    Args:
        adata: with `obsm["X_" + basis]`, `obsm[vkey + "_" + basis]` (`scv.tl.velocity_embedding`) and
            `obsp["distances"]` (`scanpy.pp.neighbors`).
        edges: known transitions, (source, target) by name.
        cluster_key: column of obs with the name of each cell's cluster.
        vkey: name of the velocities.
        basis: name of the embedding.

    Raises:
        KeyError: adata lacks a required entry.
        ValueError: a cluster that does not exist, or no edge with boundary cells.
    """
    function = "cross_boundary_correctness"
    positions = np.asarray(_found(function, "obsm", adata.obsm, f"X_{basis}"), dtype=float)
    velocities = np.asarray(
        _found(function, "obsm", adata.obsm, f"{vkey}_{basis}", "scvelo.tl.velocity_embedding makes it"), dtype=float
    )
    clusters = np.asarray(_found(function, "obs", adata.obs, cluster_key)).astype(str)
    neighbors = _neighbors(function, adata)
    values: dict[tuple[str, str], np.ndarray] = {}
    for source, target in ((str(one), str(other)) for one, other in edges):
        for name in (source, target):
            if name not in clusters:
                raise ValueError(f"{function}: no cluster {name!r}; there are {sorted(set(clusters.tolist()))}")
        boundary = []
        for cell in np.flatnonzero(clusters == source):
            across = neighbors[cell][clusters[neighbors[cell]] == target]
            if len(across):
                boundary.append(np.mean(_cosine(positions[across] - positions[cell], velocities[cell])))
        if boundary:
            values[source, target] = np.array(boundary)
    if not values:
        raise ValueError(f"{function}: no edge has a cell with a neighbor on its other side")
    means = {edge: float(found.mean()) for edge, found in values.items()}
    return CrossBoundaryCorrectness(
        edges=means,
        cells={edge: len(found) for edge, found in values.items()},
        mean_over_edges=float(np.mean(list(means.values()))),
        mean_over_cells=float(np.concatenate(list(values.values())).mean()),
    )


def velocity_consistency(adata: AnnData, *, vkey: str = "velocity") -> np.ndarray:
    """Compute the mean correlation of each cell's velocity with those of its neighbors, `[cells]`, in [0, 1].

    As in scVelo's velocity confidence a negative mean counts as 0. scVelo cuts every cell to the number of neighbors of
    the cell with the fewest; here all neighbors count. A cell without neighbors has NaN. Genes with NaN, and those that
    `var[vkey + "_genes"]` excludes, do not count.

    Args:
        adata: with `layers[vkey]` and `obsp["distances"]` (`scanpy.pp.neighbors`).
        vkey: name of the velocities.

    Raises:
        KeyError: adata lacks a required entry.
        ValueError: no gene has velocities.
    """
    function = "velocity_consistency"
    velocities = _found(function, "layers", adata.layers, vkey)
    velocities = np.asarray(velocities.toarray() if hasattr(velocities, "toarray") else velocities)
    genes = np.isfinite(velocities.sum(0, dtype=float))
    if f"{vkey}_genes" in adata.var:
        genes &= np.asarray(adata.var[f"{vkey}_genes"], dtype=bool)
    if not genes.any():
        raise ValueError(f"{function}: no gene has finite velocities in layers[{vkey!r}]")
    # The only copy, in the layer's precision: there may be hundreds of millions of values.
    centered = velocities[:, genes].astype(np.promote_types(velocities.dtype, np.float32), copy=False)
    centered -= centered.mean(1, keepdims=True, dtype=float).astype(centered.dtype)
    neighbors = _neighbors(function, adata)
    means = np.array(
        [
            _cosine(centered[others].astype(float), own.astype(float)).mean() if len(others) else np.nan
            for others, own in zip(neighbors, centered, strict=True)
        ]
    )
    return np.clip(means, 0, None)


def _found(function: str, where: str, mapping: Any, key: str, hint: str = "") -> Any:
    if key not in mapping:
        raise KeyError(f"{function}: adata.{where} has no {key!r}{f'; {hint}' if hint else ''}")
    return mapping[key]


def _neighbors(function: str, adata: AnnData) -> list[np.ndarray]:
    """Return the indices of each cell's neighbors."""
    distances = _found(function, "obsp", adata.obsp, "distances", "scanpy.pp.neighbors makes it").tocsr()
    return np.split(distances.indices, distances.indptr[1:-1])


def _cosine(vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `vectors` with `one`; 0 where either vanishes."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(one)
    return np.divide(vectors @ one, norms, out=np.zeros(len(vectors)), where=norms > 0)
