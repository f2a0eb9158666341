"""Errors of velocities against a known truth, pseudotime, and the paper's convention on real cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve
from scipy.stats import spearmanr

from experiments.rna_velocity.preparation import dense
from experiments.rna_velocity.projection import cosines
from fluxmatching.velocity.graph import find_graph

if TYPE_CHECKING:
    from anndata import AnnData

EXTREME = 5  # percent of cells, those with most u and s, that give γ/β in scVelo's steady-state model
LEAST_R2 = LEAST_RATIO = 0.01  # for a gene to be kept there
LEAST_MOVING = 1 / 20  # of a gene's largest |velocity|, for its sign to count


def cosine(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
    """Return cosines along an axis; NaN where a vector vanishes."""
    norms = np.linalg.norm(one, axis=axis) * np.linalg.norm(other, axis=axis)
    return np.divide((one * other).sum(axis), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def errors(adata: AnnData, ratio: np.ndarray) -> dict[str, float]:
    """Measure `layers["velocity"]` against `layers["true_velocity"]`, over the genes that have velocities.

    Args:
        adata: simulated cells after a fit, with the truth of `SimulatedCells.to_anndata`.
        ratio: γ/β of each gene, NaN where unknown, `[genes]`.

    Returns:
        "cells": cosine over genes, mean over cells. "genes": cosine over cells, mean over genes that move.
        "signs": fraction of right signs where the true velocity is at least a twentieth of the gene's largest.
        "ratio": median of |log| of γ/β over its true value. "time": rank correlation of `pseudotime` with true time.
        "known": number of genes with velocities. A cell or gene whose velocity is zero has cosine 0.
    """
    velocity, truth = dense(adata.layers["velocity"]), np.asarray(adata.layers["true_velocity"])
    known = np.isfinite(velocity).all(0)
    velocity, truth = velocity[:, known], truth[:, known]
    moving = np.abs(truth) > 1e-9 * np.abs(truth).max()
    counted = moving & (np.abs(truth) >= LEAST_MOVING * np.abs(truth).max(0))
    off = np.log(ratio[known] / adata.var["true_ratio"].to_numpy()[known])
    time = pseudotime(adata, velocity, known)
    return {
        "cells": float(np.nan_to_num(cosine(velocity, truth, 1)[moving.any(1)]).mean()),
        "genes": float(np.nan_to_num(cosine(velocity, truth, 0)[moving.any(0)]).mean()),
        "signs": float(np.mean((np.sign(velocity) == np.sign(truth))[counted])),
        "ratio": float(np.median(np.abs(off[np.isfinite(off)]))) if np.isfinite(off).any() else float("nan"),
        "time": float(spearmanr(time, adata.obs["true_time"]).statistic),
        "known": int(known.sum()),
    }


def pseudotime(adata: AnnData, velocity: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Return the potential whose differences between neighbors fit the velocity best, `[cells]`.

    τ minimizes Σ_ij (τ_j - τ_i - d_ij)² over pairs of neighbors, with d_ij = |x_j - x_i| (c_ij - c_ji)/2 and c_ij the
    correlation of v_i with x_j - x_i: the part of the flow that is a gradient (Hodge decomposition on a graph).

    Args:
        adata: with `layers["Ms"]`, `obsm["X_pca"]` and `obsp["connectivities"]`.
        velocity: velocities, `[cells, chosen genes]`.
        genes: mask of the chosen genes, `[genes]`.
    """
    neighbors = find_graph("pseudotime", adata, "connectivities")
    graph = cosines(dense(adata.layers["Ms"])[:, genes], velocity, neighbors, root=False, recurse=False)
    pairs = sp.coo_array(sp.triu(neighbors, 1))
    row, column = pairs.row, pairs.col
    length = np.linalg.norm(adata.obsm["X_pca"][column] - adata.obsm["X_pca"][row], axis=1)
    difference = length * np.asarray(graph[row, column] - graph[column, row]) / 2
    edges = np.arange(len(row))
    incidence = sp.csr_array(
        (np.repeat([1.0, -1.0], len(row)), (np.tile(edges, 2), np.concatenate([column, row]))), (len(row), adata.n_obs)
    )
    laplacian = incidence.T @ incidence + 1e-9 * sp.eye_array(adata.n_obs)
    return np.asarray(spsolve(sp.csc_array(laplacian), incidence.T @ difference))


def published_genes(adata: AnnData) -> np.ndarray:
    """Return the mask of the genes that scVelo's stochastic mode keeps (scVelo 0.3.4), `[genes]`.

    The slope g of u = g s is fitted to extreme cells alone: the 5 % with the highest sum of u and s, each relative to
    its maximum. A gene is kept if g is above 0.01, and so is R² of u = g s over all cells.

    Args:
        adata: with `layers["Ms"]` and `layers["Mu"]`.
    """
    s, u = dense(adata.layers["Ms"]), dense(adata.layers["Mu"])
    with np.errstate(invalid="ignore", divide="ignore"):
        place = s / np.maximum(s.max(0), 1e-3) + u / np.maximum(u.max(0), 1e-3)
        extreme = place >= np.percentile(place, 100 - EXTREME, 0)
        slope = (extreme * u * s).sum(0) / (extreme * s * s).sum(0)
        r2 = 1 - ((u - slope * s) ** 2).sum(0) / ((u - u.mean(0)) ** 2).sum(0)
    return (r2 > LEAST_R2) & (slope > LEAST_RATIO)  # NaN is not


def published_consistency(adata: AnnData) -> float:
    """Return the mean cosine, not centered, of a cell's velocity with its neighbors', over all genes that have one.

    This is how the paper's program measures consistency; a correlation is what scVelo and `velocity_consistency` use.

    Args:
        adata: with `layers["velocity"]` and `obsp["distances"]`.
    """
    velocity = dense(adata.layers["velocity"])
    velocity = velocity[:, np.isfinite(velocity).all(0)]
    velocity /= np.maximum(np.linalg.norm(velocity, axis=1, keepdims=True), 1e-30)
    near = find_graph("published_consistency", adata, "distances")
    return float(np.mean(((near @ velocity) * velocity).sum(1) / np.asarray(near.sum(1)).ravel()))
