"""From counts to neighbors and moments without scanpy, in its and scVelo's conventions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from fluxmatching.velocity import moments

if TYPE_CHECKING:
    from anndata import AnnData

NEIGHBORS, COMPONENTS = 30, 30  # the neighbors include the cell itself, as scanpy counts


def prepare(adata: AnnData, *, counts: bool = True) -> None:
    """Write what RNA velocity starts from, out of `layers["spliced"]` and `layers["unspliced"]`.

    Writes `layers["Ms"]` and `layers["Mu"]` (means over neighbors and the cell itself), `obsm["X_pca"]` (principal
    components of the spliced abundance, of its log1p if it is a count), `obsp["distances"]` (29 nearest neighbors) and
    `obsp["connectivities"]` (ones where either of two cells is among the other's neighbors).

    Args:
        adata: cells, changed in place.
        counts: whether the layers are counts, which are size-normalized.
    """
    spliced = dense(adata.layers["spliced"])
    if counts:
        spliced = np.log1p(normalize_totals(spliced))
    adata.obsm["X_pca"] = principal_components(spliced, COMPONENTS)
    distances = nearest_neighbors(adata.obsm["X_pca"], NEIGHBORS - 1)
    connectivities = ((distances + distances.T) > 0).astype(float)
    # scVelo needs sparse matrices, not arrays.
    adata.obsp["distances"] = sp.csr_matrix(distances)
    adata.obsp["connectivities"] = sp.csr_matrix(connectivities)
    adata.uns["neighbors"] = {
        "distances_key": "distances",
        "connectivities_key": "connectivities",
        "params": {"n_neighbors": NEIGHBORS, "method": "umap", "metric": "euclidean", "random_state": 0},
    }
    moments(adata)


def dense(layer: np.ndarray | sp.sparray | sp.spmatrix) -> np.ndarray:
    """Return a layer as a dense array in float64."""
    return np.asarray(layer.toarray() if hasattr(layer, "toarray") else layer, dtype=float)


def normalize_totals(counts: np.ndarray) -> np.ndarray:
    """Scale each cell's counts to the median total of the cells; cells without counts stay zero."""
    totals = counts.sum(1, keepdims=True)
    return counts * (np.median(totals) / np.maximum(totals, 1e-12))


def principal_components(x: np.ndarray, number: int) -> np.ndarray:
    """Return the scores of the leading principal components, largest first, `[cells, components]`."""
    centered = (x - x.mean(0)).astype(np.float32)
    number = min(number, min(centered.shape) - 1)
    left, values, _ = svds(centered, number, v0=np.ones(min(centered.shape), np.float32))
    return np.ascontiguousarray((left * values)[:, ::-1])


def nearest_neighbors(x: np.ndarray, number: int) -> sp.csr_array:
    """Return the distances to each cell's nearest other cells, `[cells, cells]` with `number` values per row."""
    cells = len(x)
    number = min(number, cells - 1)
    x = x.astype(float)
    squares = (x**2).sum(1)
    columns, values = np.empty((cells, number), int), np.empty((cells, number))
    for rows in np.array_split(np.arange(cells), -(-cells // 1024)):
        squared = squares[rows, None] + squares - 2 * x[rows] @ x.T
        squared[np.arange(len(rows)), rows] = np.inf
        nearest = np.sort(np.argpartition(squared, number - 1, axis=1)[:, :number], axis=1)
        columns[rows] = nearest
        values[rows] = np.sqrt(np.maximum(np.take_along_axis(squared, nearest, 1), 1e-12))
    return sp.csr_array((values.ravel(), columns.ravel(), number * np.arange(cells + 1)), shape=(cells, cells))
