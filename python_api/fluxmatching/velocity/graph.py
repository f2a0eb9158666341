"""Neighbors of cells: the one place where a stored graph becomes a set of neighbors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fluxmatching.velocity.layers import in_memory
from fluxmatching.velocity.sparse import sparse

if TYPE_CHECKING:
    from anndata import AnnData

KINDS = ("connectivities", "distances")


def neighbor_graph(function: str, graph: Any, cells: int, kind: str = "connectivities") -> sparse.csr_array:
    """Return the neighbors of each cell as a matrix of zeros and ones, `[cells, cells]`; no cell is its own neighbor.

    Row i has a one at j if j is a neighbor of i. What a stored value means depends on the kind of graph:

        connectivities    strength of a connection: neighbors are the positive values; a stored zero is none
        distances         neighbors are the stored values, zeros included (two cells may coincide); infinity is none.
                          A dense matrix has no stored zeros: there, zero means no neighbor.

    Args:
        function: name for error messages.
        graph: SciPy sparse matrix or array, dense array, or one read lazily by AnnData; need not be symmetric.
        cells: number of cells.
        kind: "connectivities" or "distances".

    Raises:
        ValueError: wrong shape, a negative value or NaN.
    """
    graph = in_memory(function, "the graph of neighbors", graph)
    if graph.shape != (cells, cells):
        raise ValueError(
            f"{function}: the graph of neighbors must be of shape {(cells, cells)}, got {graph.shape}; "
            f"it belongs to other cells"
        )
    stored = graph if sparse.issparse(graph) else sparse.csr_array(graph)
    stored = sparse.coo_array(stored)
    if not (stored.data >= 0).all():  # false for NaN too
        raise ValueError(f"{function}: the graph of neighbors has negative values or NaN")
    present = np.isfinite(stored.data) if kind == "distances" else stored.data > 0
    present &= stored.row != stored.col
    row, column = stored.row[present], stored.col[present]
    result = sparse.csr_array((np.ones(len(row)), (row, column)), shape=(cells, cells))
    result.sum_duplicates()
    result.data[:] = 1.0
    return result


def find_graph(
    function: str, adata: AnnData, kind: str, key: str | None = None, setting: str | None = None
) -> sparse.csr_array:
    """Find the graph of annotated data, and return its neighbors as `neighbor_graph` does.

    Args:
        function: name for error messages.
        adata: with a graph as `scanpy.pp.neighbors` or scVelo write it.
        kind: "connectivities" or "distances": the one that is read.
        key: entry of `uns` in which scanpy describes the graph (its `neighbors_key`), or the name of a graph in `obsp`
            itself; None for scanpy's default.
        setting: what users give the key to, for error messages; None for the function.

    Raises:
        KeyError: there is no such graph.
        ValueError: see `neighbor_graph`.
    """
    name = kind
    if key is None or key in adata.uns:
        described = adata.uns.get("neighbors" if key is None else key, {})
        described = described if hasattr(described, "get") else {}
        if key is not None and f"{kind}_key" not in described:
            raise KeyError(f"{function}: adata.uns[{key!r}] describes no graph: it has no {kind}_key")
        name = str(described.get(f"{kind}_key", kind))
    else:
        name = key
    if name not in adata.obsp:
        owner = function if setting is None else setting
        other = "" if key is not None else f", and {owner}(neighbors=...) takes one made with key_added=..."
        raise KeyError(
            f"{function}: adata.obsp has no {name!r} (it has {sorted(adata.obsp)}); scanpy.pp.neighbors(adata) makes "
            f"it{other}"
        )
    return neighbor_graph(function, adata.obsp[name], adata.n_obs, kind)


def averaging(neighbors: sparse.csr_array, *, include_self: bool = True) -> sparse.csr_array:
    """Return the matrix of means over the neighbors of each cell, `[cells, cells]`.

    Args:
        neighbors: zeros and ones, from `neighbor_graph`.
        include_self: whether the cell itself counts as one more. Otherwise a cell without neighbors has a row of zeros.
    """
    if include_self:
        neighbors = sparse.csr_array(neighbors + sparse.eye_array(neighbors.shape[0]))
    counts = np.asarray(neighbors.sum(1)).ravel()
    result = neighbors.copy()
    result.data = result.data / np.repeat(np.maximum(counts, 1), np.diff(neighbors.indptr))
    return result
