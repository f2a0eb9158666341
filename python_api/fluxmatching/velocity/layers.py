"""Layers of annotated data, however they are stored, as blocks of genes or cells in float64."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any, Protocol

import numpy as np

from fluxmatching.velocity.sparse import sparse

CHUNK = 256  # genes that are taken out of a sparse matrix of rows at a time
BLOCK_VALUES = 2**21  # values of a dense block, 16 MiB


def check_annotated(function: str, adata: object) -> None:
    """Raise TypeError unless `adata` is an AnnData, or has what the functions here read of one."""
    if not all(hasattr(adata, name) for name in ("layers", "obs", "obsm", "obsp", "uns", "var", "n_obs")):
        hint = "; anndata.read_h5ad reads one from a file" if isinstance(adata, (str, PathLike)) else ""
        raise TypeError(f"{function}: adata must be an AnnData, got {type(adata).__name__}{hint}")


def in_memory(function: str, name: str, layer: Any) -> Any:
    """Return a layer as a dense array or a sparse CSR array in memory; a layer in one of these forms is not copied.

    Takes NumPy arrays, SciPy's sparse matrices and arrays, and what AnnData gives for data on disk: datasets of HDF5
    and Zarr, its sparse datasets, and the Dask arrays of `anndata.experimental.read_lazy`.

    Raises:
        TypeError: not a matrix of numbers.
        ValueError: not of two dimensions.
    """
    if hasattr(layer, "compute"):  # Dask
        layer = layer.compute()
    elif hasattr(layer, "to_memory"):  # sparse datasets of AnnData
        layer = layer.to_memory()
    if hasattr(layer, "tocsr"):
        layer = sparse.csr_array(layer)
        kind = layer.dtype.kind
    else:
        layer = np.asarray(layer)
        kind = layer.dtype.kind
    if kind not in "fiub":
        raise TypeError(f"{function}: {name} must hold real numbers, got dtype {layer.dtype}")
    if layer.ndim != 2:
        raise ValueError(f"{function}: {name} must have two dimensions, got shape {layer.shape}")
    return layer


class Columns(Protocol):
    """Source of values per cell and gene, which are computed or converted block by block."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and genes."""
        ...

    def genes(self, chosen: np.ndarray) -> np.ndarray:
        """Return the values of some genes, `[cells, chosen]`, dense in float64; the caller may change them."""
        ...


class Layer:
    """Layer as it is stored.

    Args:
        values: as `in_memory` returns it.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self._chunk: tuple[int, sparse.csc_array] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return int(rows), int(columns)

    def genes(self, chosen: np.ndarray) -> np.ndarray:
        if not sparse.issparse(self.values):
            return self.values[:, chosen].astype(np.float64, copy=False)
        found = np.empty((self.shape[0], len(chosen)))
        for number in np.unique(chosen // CHUNK):
            inside = chosen // CHUNK == number
            found[:, inside] = self._columns(int(number))[:, chosen[inside] % CHUNK].toarray()
        return found

    def _columns(self, number: int) -> sparse.csc_array:
        """Return a chunk of genes by columns; the last one is kept, since blocks in order share it."""
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = None
            part = self.values[:, number * CHUNK : (number + 1) * CHUNK]
            self._chunk = number, sparse.csc_array(part)
        return self._chunk[1]

    def cells(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the values of some cells, `[rows, genes]`, dense in float64."""
        part = self.values[rows]
        return np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float64)

    def totals(self) -> np.ndarray:
        """Return the sum over genes of each cell's finite values, `[cells]`."""
        total = np.asarray(self.values.sum(1, dtype=np.float64)).ravel()
        for cell in np.flatnonzero(~np.isfinite(total)):
            own = self.cells(slice(cell, cell + 1))
            total[cell] = own[np.isfinite(own)].sum()
        return total


class ScaledLayer:
    """Layer whose cells are scaled.

    Args:
        layer: values.
        sizes: factor of each cell, `[cells]`.
    """

    def __init__(self, layer: Columns, sizes: np.ndarray) -> None:
        self.layer, self.sizes = layer, sizes

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    def genes(self, chosen: np.ndarray) -> np.ndarray:
        return self.layer.genes(chosen) * self.sizes[:, None]


class AveragedLayer:
    """Means over neighbors of a layer whose cells are scaled first: moments, as scVelo defines them.

    Args:
        counts: counts.
        sizes: factor of each cell, `[cells]`.
        mean: matrix of means over neighbors, `[cells, cells]`.
    """

    def __init__(self, counts: Columns, sizes: np.ndarray, mean: sparse.csr_array) -> None:
        self.counts, self.sizes, self.mean = counts, sizes, mean

    @property
    def shape(self) -> tuple[int, int]:
        return self.counts.shape

    def genes(self, chosen: np.ndarray) -> np.ndarray:
        values = self.counts.genes(chosen)
        values *= self.sizes[:, None]
        return np.asarray(self.mean @ values)


class PermutedLayer:
    """Layer in which the cells of every gene are permuted, each gene in its own way.

    Args:
        layer: values.
        seed: determines the permutations; a gene's does not depend on the other genes.
    """

    def __init__(self, layer: Columns, seed: int) -> None:
        self.layer, self.seed = layer, seed

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    def genes(self, chosen: np.ndarray) -> np.ndarray:
        values = self.layer.genes(chosen)
        for column, gene in enumerate(chosen):
            values[:, column] = np.random.default_rng((self.seed, int(gene))).permutation(values[:, column])
        return values


def gene_blocks(cells: int, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Cut genes, in the given order, into blocks of at most `BLOCK_VALUES` values."""
    size = max(1, BLOCK_VALUES // max(cells, 1))
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


def cell_blocks(cells: int, width: int) -> Iterator[slice]:
    """Cut cells into blocks of at most `BLOCK_VALUES` values, `width` per cell."""
    size = max(1, BLOCK_VALUES // max(width, 1))
    for start in range(0, cells, size):
        yield slice(start, min(start + size, cells))
