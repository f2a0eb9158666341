"""Simulated counts of cells with known RNA velocity, and a graph of their neighbors."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse


def nearest(positions: np.ndarray, count: int) -> sparse.csr_matrix:
    """Return a symmetric graph of nearest neighbors, with connectivities in (0, 1]."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    graph = np.zeros_like(distances)
    np.put_along_axis(graph, np.argsort(distances, 1)[:, :count], 1.0, 1)
    strength = np.exp(-np.where(np.isfinite(distances), distances, 0))
    return sparse.csr_matrix(np.maximum(graph, graph.T) * strength)


def kinetics(cells: int, genes: int, seed: int) -> dict[str, np.ndarray]:
    """Simulate counts of genes that switch on and off along a course, with ds/dt, γ/β and time."""
    generator = np.random.default_rng(seed)
    time = generator.uniform(0, 20, (cells, 1))
    beta, gamma = np.exp(generator.normal(np.log([[0.6], [0.35]]), 0.3, (2, genes)))
    on, lasting = generator.uniform(-8, 14, genes), generator.uniform(5, 10, genes)

    def risen(time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        by_splicing, by_degradation = np.exp(-beta * time), np.exp(-gamma * time)
        mixed = (by_degradation - by_splicing) / (gamma - beta)
        return (1 - by_splicing) / beta, (1 - by_degradation) / gamma + mixed

    # The equations are linear: what is switched off falls as a second rise would have risen.
    rise, fall = risen(np.maximum(time - on, 0)), risen(np.maximum(time - on - lasting, 0))
    unspliced, spliced = (40 * (one - other) for one, other in zip(rise, fall, strict=True))
    return {
        "unspliced": generator.poisson(unspliced).astype(np.float32),
        "spliced": generator.poisson(spliced).astype(np.float32),
        "velocity": beta * unspliced - gamma * spliced,
        "ratio": gamma / beta,
        "time": time[:, 0],
    }


def annotated(cells: int = 200, genes: int = 40, seed: int = 0, neighbors: int = 15) -> Any:
    """Return simulated counts with a graph of neighbors, without moments."""
    import anndata

    made = kinetics(cells, genes, seed)
    adata = anndata.AnnData(made["spliced"].copy(), layers={key: made[key] for key in ("unspliced", "spliced")})
    adata.obsp["connectivities"] = nearest(np.log1p(made["spliced"]), neighbors)
    adata.layers["true_velocity"], adata.var["true_ratio"] = made["velocity"], made["ratio"]
    adata.obs["time"] = made["time"]
    return adata


def mean_matrix(graph: Any) -> np.ndarray:
    """Return the dense matrix of means over neighbors and the cell itself."""
    adjacent = (graph.toarray() > 0) + np.eye(graph.shape[0])
    return np.asarray(adjacent / adjacent.sum(1, keepdims=True))


def moments_of(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return means over neighbors of counts that are scaled to their median total."""
    totals = counts.sum(1, keepdims=True)
    return np.asarray(mean @ (counts * np.median(totals) / totals))


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows."""
    return np.asarray((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))
