"""State of the cells in which the shared flow lives: its directions, and the plane of the cells around each cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import eigsh

from fluxmatching.velocity.layers import Columns, cell_blocks, gene_blocks

DENSE = 300  # genes up to which all eigenvectors are cheap
LARGEST = 1e30  # abundances from here on count as not finite: float32 cannot hold their products


@dataclass(frozen=True)
class CellState:
    """Cells in the principal directions of log(1 + s).

    Attributes:
        position: z, `[cells, d]`.
        directions: orthonormal directions, `[d, genes]`; 0 for genes that are not finite.
        tangent: C (C + ε tr C I)⁻¹ of each cell's neighborhood with covariance C, `[cells, d, d]`, float32: it keeps
            what lies along the cells of a vector and removes what lies across.
        mean: matrix of means over neighbors and the cell itself, `[cells, cells]`.
        smoothed: s averaged over neighbors once more, `[cells, genes]`, float32; 0 for genes that are not finite.
        finite: whether all values of a gene are finite, `[genes]`.
    """

    position: np.ndarray
    directions: np.ndarray
    tangent: np.ndarray
    mean: sparse.csr_array
    smoothed: np.ndarray
    finite: np.ndarray

    def flow(self, kinetic: np.ndarray) -> np.ndarray:
        """Return the flow of a kinetic velocity `[cells, d]`: its part along the cells, averaged over neighbors.

        The kinetic velocity is first divided by the root of the median of its squared lengths, which sets the unit of
        time.
        """
        size = np.sqrt(np.median(np.einsum("nd,nd->n", kinetic, kinetic, dtype=np.float64)))
        if size == 0:
            raise ValueError("flux_velocity: more than half of the cells have no kinetic velocity")
        scaled = np.asarray(kinetic / size, dtype=np.float32)
        return np.asarray(self.mean @ np.matmul(self.tangent, scaled[:, :, None])[:, :, 0].astype(np.float64))

    def slope(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the smoothed s of some genes and the derivative of log(1 + s) there, each `[cells, chosen]`."""
        smoothed = self.smoothed[:, chosen].astype(np.float64)
        return smoothed, 1 / (1 + smoothed)


def cell_state(spliced: Columns, mean: sparse.csr_array, dimensions: int, ridge: float) -> CellState:
    """Compute the state of all cells.

    Args:
        spliced: moments s.
        mean: matrix of means over neighbors and the cell itself.
        dimensions: largest number of directions d; fewer if the cells span fewer.
        ridge: ε of the tangent.
    """
    cells, genes = spliced.shape
    # One array of this size in all: log(1 + s) first, then the smoothed s.
    values = np.empty((cells, genes), dtype=np.float32)
    finite = np.zeros(genes, dtype=bool)
    for chosen in gene_blocks(cells, np.arange(genes)):
        block = spliced.genes(chosen)
        finite[chosen] = good = (np.abs(block) < LARGEST).all(0)
        block[:, ~good] = 0
        values[:, chosen] = np.log1p(block)
    if not finite.any():
        raise ValueError("flux_velocity: no gene has finite spliced abundances in all cells")
    directions, center = _principal_directions(values, dimensions)
    position = np.concatenate(
        [values[rows].astype(np.float64) @ directions.T for rows in cell_blocks(cells, genes)]
    ) - (directions @ center)
    for chosen in gene_blocks(cells, np.arange(genes)):
        values[:, chosen] = mean @ np.expm1(values[:, chosen].astype(np.float64))
    return CellState(position, directions, tangent(position, mean, ridge), mean, values, finite)


def _principal_directions(values: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the leading principal directions `[d, genes]` and the mean `[genes]` of values `[cells, genes]`."""
    cells, genes = values.shape
    center = values.mean(0, dtype=np.float64)
    gram = np.zeros((genes, genes))
    for rows in cell_blocks(cells, genes):
        block = values[rows] - center.astype(np.float32)  # products in float32, blocks are added in float64
        gram += block.T @ block
    most = min(dimensions, genes)
    if genes > DENSE:
        variances, vectors = eigsh(gram, most, v0=np.ones(genes))
    else:
        variances, vectors = linalg.eigh(gram, subset_by_index=[genes - most, genes - 1], overwrite_a=True)
    # Directions beyond the rank of the data are rounding errors.
    present = variances > 1e-9 * max(variances[-1], 0)
    if not present.any() or variances[-1] <= 1e-9 * cells * max(1.0, float((center**2).max())):
        raise ValueError("flux_velocity: the cells do not differ in their spliced abundances")
    return np.ascontiguousarray(vectors[:, present][:, ::-1].T), center


def tangent(position: np.ndarray, mean: sparse.csr_array, ridge: float) -> np.ndarray:
    """Return C (C + ridge tr C I)⁻¹ of every cell, `[cells, d, d]`; 0 where the neighborhood is a single point."""
    cells, dimensions = position.shape
    result = np.empty((cells, dimensions, dimensions), dtype=np.float32)
    counts = np.diff(mean.indptr)
    by_count = np.argsort(counts, kind="stable")  # cells of a block are padded to the same number of neighbors
    centers = mean @ position
    for block in cell_blocks(cells, dimensions * max(dimensions, int(counts.max()))):
        rows = by_count[block]
        width = np.arange(counts[rows].max())
        present = width < counts[rows, None]
        entry = np.where(present, mean.indptr[rows, None] + width, 0)
        around = position[mean.indices[entry]] - centers[rows, None]
        around *= np.sqrt(np.where(present, mean.data[entry], 0))[:, :, None]
        covariance = np.matmul(around.transpose(0, 2, 1), around)
        added = np.maximum(ridge * np.trace(covariance, axis1=1, axis2=2), 1e-30)
        solvable = covariance + added[:, None, None] * np.eye(dimensions)
        result[rows] = np.linalg.solve(solvable, covariance)
    return result
