"""Statistics of single genes: the ratio γ/β that a fit starts from, and which genes have usable unspliced counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fluxmatching.velocity.layers import Columns, gene_blocks
from fluxmatching.velocity.sparse import sparse

EXTREME_PERCENT = 5.0  # of the cells at either end
# A gene's velocity is drawn and passed on if its phase portrait is at least that well described (scVelo's thresholds).
LEAST_R2, LEAST_RATIO = 0.01, 0.01


@dataclass(frozen=True)
class GeneStatistics:
    """Statistics of all genes; each array is `[genes]`.

    Attributes:
        usable: whether both abundances are finite and have a positive mean.
        ratio: γ/β by the cells of the extremes, `start_ratio`; NaN where not usable.
        correlation: `neighbor_correlation` of the unspliced counts.
        velocity_genes: whether u ≈ ratio s describes more than a hundredth of the variance of u, as scVelo requires.
    """

    usable: np.ndarray
    ratio: np.ndarray
    correlation: np.ndarray
    velocity_genes: np.ndarray


def start_ratio(unspliced: np.ndarray, spliced: np.ndarray) -> np.ndarray:
    """Estimate γ/β of each gene from its extreme cells, which are near a steady state (Bergen et al. 2020).

    r = Σ u s / Σ s² over the cells whose u/max(u) + s/max(s) is in the lowest or highest 5 percent.

    Args:
        unspliced, spliced: moments, `[cells, genes]`, at least 0; each gene with a positive mean.

    Returns:
        `[genes]`, within a factor of 1000 of mean(u)/mean(s).
    """
    size = unspliced / unspliced.max(0) + spliced / spliced.max(0)
    low, high = np.percentile(size, [EXTREME_PERCENT, 100 - EXTREME_PERCENT], axis=0, overwrite_input=False)
    weight = (size >= high) | (size <= low)
    spliced_there = spliced * weight
    ratio = np.einsum("ng,ng->g", spliced_there, unspliced)
    ratio /= np.maximum(np.einsum("ng,ng->g", spliced_there, spliced), 1e-12)
    mean = unspliced.mean(0) / spliced.mean(0)
    clipped: np.ndarray = np.clip(ratio, 1e-3 * mean, 1e3 * mean)
    return clipped


def neighbor_correlation(counts: np.ndarray, near: sparse.csr_array) -> np.ndarray:
    """Correlate each gene's value in a cell with the mean over the cell's neighbors, itself excluded.

    Counts of a gene that follows the cells' state correlate; counting noise of different cells does not. Moments would
    not do: means over overlapping neighborhoods always correlate.

    Args:
        counts: `[cells, genes]`, not averaged.
        near: matrix of means over neighbors without the cell itself, `[cells, cells]`.

    Returns:
        `[genes]`, in [-1, 1]; 0 for a constant gene.
    """
    means = near @ counts
    counts = counts - counts.mean(0)
    means -= means.mean(0)
    norms = np.sqrt(np.einsum("ng,ng->g", counts, counts) * np.einsum("ng,ng->g", means, means))
    return np.divide(np.einsum("ng,ng->g", counts, means), norms, out=np.zeros(len(norms)), where=norms > 0)


def gene_statistics(
    unspliced: Columns, spliced: Columns, counts: Columns, sizes: np.ndarray, near: sparse.csr_array
) -> GeneStatistics:
    """Compute the statistics of all genes, block by block.

    Args:
        unspliced, spliced: moments.
        counts: unspliced counts, not averaged.
        sizes: factor of each cell for `counts`, `[cells]`.
        near: see `neighbor_correlation`.

    Raises:
        ValueError: a negative value.
    """
    cells, genes = spliced.shape
    usable, velocity_genes = np.zeros(genes, dtype=bool), np.zeros(genes, dtype=bool)
    ratio, correlation = np.full(genes, np.nan), np.zeros(genes)
    for chosen in gene_blocks(cells, np.arange(genes)):
        u, s, raw = unspliced.genes(chosen), spliced.genes(chosen), counts.genes(chosen)
        for name, values in (("unspliced", u), ("spliced", s), ("counts", raw)):
            if (values < 0).any():
                raise ValueError(f"flux_velocity: {name} abundances must be at least 0, got {np.nanmin(values):g}")
        with np.errstate(over="ignore", invalid="ignore"):
            means = np.stack([u.mean(0), s.mean(0), raw.mean(0)])
        good = np.isfinite(means).all(0) & (means[:2] > 0).all(0)
        usable[chosen] = good
        if not good.all():
            u, s, raw, chosen = u[:, good], s[:, good], raw[:, good], chosen[good]
        ratio[chosen] = start_ratio(u, s)
        correlation[chosen] = neighbor_correlation(raw * sizes[:, None], near)
        left = ((u - ratio[chosen] * s) ** 2).sum(0)
        explained = 1 - left / np.maximum(u.var(0) * cells, 1e-300)
        velocity_genes[chosen] = (explained > LEAST_R2) & (ratio[chosen] > LEAST_RATIO)
    return GeneStatistics(usable, ratio, correlation, velocity_genes)
