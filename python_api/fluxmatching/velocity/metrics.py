"""Metrics of velocities: agreement with known transitions between clusters, and with neighbors (Sec. 4.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxmatching.velocity.graph import find_graph
from fluxmatching.velocity.layers import check_annotated, in_memory

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class CrossBoundaryCorrectness:
    """Result of `cross_boundary_correctness`; all means in [-1, 1].

    Attributes:
        edges: mean over the boundary cells of each edge, by (source, target); without edges that have none.
        cells: number of boundary cells of each of these edges.
        missing: number of boundary cells of each edge that were left out, because their velocity or position, or the
            positions of all their neighbors beyond, are not finite.
        mean_over_edges: mean of `edges`: every transition has the same weight.
        mean_over_cells: mean over the boundary cells of all edges together: large clusters have more weight.
    """

    edges: dict[tuple[str, str], float]
    cells: dict[tuple[str, str], int]
    missing: dict[tuple[str, str], int]
    mean_over_edges: float
    mean_over_cells: float


def cross_boundary_correctness(
    adata: AnnData,
    edges: Iterable[tuple[str, str]],
    *,
    cluster_key: str = "clusters",
    vkey: str = "velocity",
    basis: str = "umap",
    neighbors: str | None = None,
) -> CrossBoundaryCorrectness:
    """Measure whether cells at a boundary move across it: cos(v_i, y_j - y_i) for cells i and neighbors j beyond it.

    A boundary cell of an edge (A, B) is one of A with at least one neighbor in B. Its value is the mean over those
    neighbors; positions y and velocities v are those of an embedding. Where a vector vanishes the cosine is 0. Missing
    values are left out and counted.

    The measure rewards smooth velocities as such: report it beside that of `control_without_unspliced`.

    Args:
        adata: with `obsm["X_" + basis]`, `obsm[vkey + "_" + basis]` (`scv.tl.velocity_embedding`) and a graph of
            distances (`scanpy.pp.neighbors`).
        edges: known transitions, (source, target) by name.
        cluster_key: column of obs with the name of each cell's cluster.
        vkey: name of the velocities.
        basis: name of the embedding.
        neighbors: entry of `adata.uns` that describes the graph, or a graph of distances in `adata.obsp`; None takes
            scanpy's default.

    Raises:
        KeyError: adata lacks a required entry.
        TypeError: adata is no AnnData, or edges are no pairs.
        ValueError: a cluster that does not exist, no edge with boundary cells, or nothing finite at any of them.
    """
    function = "cross_boundary_correctness"
    check_annotated(function, adata)
    positions = np.asarray(_found(function, "obsm", adata.obsm, f"X_{basis}"), dtype=float)
    velocities = np.asarray(
        _found(function, "obsm", adata.obsm, f"{vkey}_{basis}", "scvelo.tl.velocity_embedding makes it"), dtype=float
    )
    clusters = np.asarray(_found(function, "obs", adata.obs, cluster_key)).astype(str)
    graph = find_graph(function, adata, "distances", neighbors)
    values: dict[tuple[str, str], np.ndarray] = {}
    for source, target in _pairs(function, edges):
        for name in (source, target):
            if name not in clusters:
                raise ValueError(f"{function}: no cluster {name!r}; there are {sorted(set(clusters.tolist()))}")
        boundary = []
        for cell in np.flatnonzero(clusters == source):
            others = graph.indices[graph.indptr[cell] : graph.indptr[cell + 1]]
            across = others[clusters[others] == target]
            if len(across):
                cosines = _cosine(positions[across] - positions[cell], velocities[cell])
                boundary.append(_mean_of_finite(cosines))
        if boundary:
            values[source, target] = np.array(boundary)
    if not values:
        raise ValueError(f"{function}: no edge has a cell with a neighbor on its other side")
    finite = {edge: found[np.isfinite(found)] for edge, found in values.items()}
    means = {edge: float(found.mean()) for edge, found in finite.items() if len(found)}
    if not means:
        count = sum(map(len, values.values()))
        raise ValueError(f"{function}: none of the {count} boundary cells has a finite velocity and position")
    return CrossBoundaryCorrectness(
        edges=means,
        cells={edge: len(finite[edge]) for edge in means},
        missing={edge: len(found) - len(finite[edge]) for edge, found in values.items()},
        mean_over_edges=float(np.mean(list(means.values()))),
        mean_over_cells=float(np.concatenate(list(finite.values())).mean()),
    )


def velocity_consistency(adata: AnnData, *, vkey: str = "velocity", neighbors: str | None = None) -> np.ndarray:
    """Compute the mean correlation of each cell's velocity with those of its neighbors, `[cells]`, in [0, 1].

    As in scVelo's velocity confidence a negative mean counts as 0. scVelo cuts every cell to the number of neighbors of
    the cell with the fewest; here all neighbors count. Genes that `var[vkey + "_genes"]` excludes do not count.

    Missing values are left out: a correlation is over the genes that are finite in both cells. A cell that has no
    neighbor with at least two such genes has NaN. A warning counts the missing values and the cells that have no value
    because of them.

    Args:
        adata: with `layers[vkey]` and a graph of distances (`scanpy.pp.neighbors`).
        vkey: name of the velocities.
        neighbors: see `cross_boundary_correctness`.

    Raises:
        KeyError: adata lacks a required entry.
        ValueError: no cell has finite velocities, or no two neighbors have a gene in common.
    """
    function = "velocity_consistency"
    check_annotated(function, adata)
    found = _found(function, "layers", adata.layers, vkey, "flux_velocity makes it")
    velocities = in_memory(function, f"layers[{vkey!r}]", found)
    velocities = velocities.toarray() if hasattr(velocities, "toarray") else velocities
    genes = np.zeros(velocities.shape[1], dtype=bool)
    for start in range(0, len(velocities), 4096):  # a mask of all values could be gigabytes
        genes |= np.isfinite(velocities[start : start + 4096]).any(0)
    if f"{vkey}_genes" in adata.var:
        genes &= np.asarray(adata.var[f"{vkey}_genes"], dtype=bool)
    if not genes.any():
        raise ValueError(f"{function}: no gene has finite velocities in layers[{vkey!r}]")
    graph = find_graph(function, adata, "distances", neighbors)
    # The only copy, in the layer's precision: there may be hundreds of millions of values.
    chosen = velocities[:, genes].astype(np.promote_types(velocities.dtype, np.float32), copy=False)
    means = np.full(len(chosen), np.nan)
    for cell, own in enumerate(chosen):
        others = graph.indices[graph.indptr[cell] : graph.indptr[cell + 1]]
        if len(others):
            means[cell] = _mean_of_finite(_correlation(chosen[others].astype(float), own.astype(float)))
    if np.isnan(means).all():
        raise ValueError(f"{function}: no two neighbors have finite velocities of the same genes")
    missing = sum(int(np.count_nonzero(~np.isfinite(own))) for own in chosen)
    if missing:
        lost = int(np.count_nonzero(np.isnan(means) & (np.diff(graph.indptr) > 0)))
        warnings.warn(
            f"{function}: {missing} of {chosen.size} velocities are not finite and left out; {lost} of {len(means)} "
            f"cells have no value for this reason",
            stacklevel=2,
        )
    return np.clip(means, 0, None)


def _pairs(function: str, edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    pairs = list(edges)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"{function}: edges must be a list of pairs (source, target), got {edges!r}")
    return [(str(source), str(target)) for source, target in pairs]


def _found(function: str, where: str, mapping: Any, key: str, hint: str = "") -> Any:
    if key not in mapping:
        raise KeyError(f"{function}: adata.{where} has no {key!r}{f'; {hint}' if hint else ''}")
    return mapping[key]


def _mean_of_finite(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def _cosine(vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `vectors` with `one`: 0 where either vanishes, NaN where one is not finite."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(one)
    finite = np.isfinite(vectors).all(1) & np.isfinite(one).all()
    products = np.where(finite[:, None], vectors, 0) @ np.where(np.isfinite(one), one, 0)
    return np.where(finite, np.divide(products, norms, out=np.zeros(len(vectors)), where=norms > 0), np.nan)


def _correlation(vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the correlation of each row of `vectors` with `one` over the entries that are finite in both.

    It is 0 where either is constant, and NaN where fewer than two entries are finite in both.
    """
    both = np.isfinite(vectors) & np.isfinite(one)
    count = np.maximum(both.sum(1), 1)[:, None]
    rows, own = np.where(both, vectors, 0), np.where(both, one, 0)
    rounding = 1e-12 * np.linalg.norm(rows, axis=1) * np.linalg.norm(own, axis=1)  # what is left of a constant
    rows, own = (np.where(both, x - x.sum(1, keepdims=True) / count, 0) for x in (rows, own))
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(own, axis=1)
    products = np.einsum("ng,ng->n", rows, own)
    found = np.divide(products, norms, out=np.zeros(len(rows)), where=norms > rounding)
    return np.where(both.sum(1) > 1, found, np.nan)
