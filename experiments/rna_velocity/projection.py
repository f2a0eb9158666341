"""Velocities projected on an embedding by scVelo's rule, without scVelo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from experiments.rna_velocity.preparation import dense
from fluxmatching.velocity.graph import find_graph

if TYPE_CHECKING:
    from anndata import AnnData

WEIGHT = 10.0  # of a cosine in the exponent


def project(adata: AnnData, basis: str, *, root: bool, genes: np.ndarray | None = None) -> None:
    """Write `obsm["velocity_" + basis]`, the projection of `layers["velocity"]`.

    For cells j among the neighbors of i and their neighbors, with cosines c_ij of `cosines` and positions y,

        w_ij = sign(c_ij) (e^{10 |c_ij|} - 1),   p_ij = w_ij / Σ_k |w_ik|,   e_ij = (y_j - y_i) / |y_j - y_i|
        projection_i = Σ_j (p_ij - mean_k p_ik) e_ij

    The sum Σ_k |w_ik| includes w_ii from c_ii = max(0, q - max_k c_ik), where q is the 98th percentile of the maxima.
    These are `scvelo.tl.velocity_graph` and `scvelo.tl.velocity_embedding` of scVelo 0.3.4, up to the length of all
    arrows together.

    Args:
        adata: with `layers["Ms"]`, `layers["velocity"]` and `obsp["distances"]`.
        basis: name of the embedding.
        root: whether vectors are compared after sign(x) √|x|.
        genes: mask of the genes that count; None for `var["velocity_genes"]`. Genes with missing velocities never do.
    """
    velocity = dense(adata.layers["velocity"])
    if genes is None:
        genes = (
            adata.var["velocity_genes"].to_numpy(bool) if "velocity_genes" in adata.var else np.ones(adata.n_vars, bool)
        )
    genes = genes & np.isfinite(velocity).all(0)
    neighbors = find_graph("project", adata, "distances")
    graph = cosines(dense(adata.layers["Ms"])[:, genes], velocity[:, genes], neighbors, root=root)
    positions = np.asarray(adata.obsm[f"X_{basis}"], dtype=float)[:, :2]
    adata.obsm[f"velocity_{basis}"] = displacements(graph, positions)


def cosines(
    states: np.ndarray, velocity: np.ndarray, neighbors: sp.csr_array, *, root: bool, recurse: bool = True
) -> sp.csr_array:
    """Return the correlations over genes of v_i with x_j - x_i, for j among neighbors of i and their neighbors.

    Args:
        states: x, `[cells, genes]`.
        velocity: v, `[cells, genes]`.
        neighbors: zeros and ones, `[cells, cells]`.
        root: whether both vectors enter as sign(x) √|x|.
        recurse: whether the neighbors' neighbors count.
    """
    x, v = states.astype(np.float32), velocity.astype(np.float32)
    v = _root(v) if root else v
    v = v - v.mean(1, keepdims=True)
    v /= np.maximum(np.linalg.norm(v, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    reached = sp.csr_array(neighbors + neighbors @ neighbors) if recurse else neighbors.copy()  # sorted and cut below
    reached.sort_indices()
    values = np.zeros(reached.nnz)
    for cell in range(len(x)):
        entries = slice(reached.indptr[cell], reached.indptr[cell + 1])
        step = x[reached.indices[entries]] - x[cell]
        if root:
            step = _root(step)
        step -= step.mean(1, keepdims=True)
        norms = np.sqrt(np.einsum("ij,ij->i", step, step))
        values[entries] = np.divide(step @ v[cell], norms, out=np.zeros_like(norms), where=norms > 0)
    found = sp.csr_array((values, reached.indices, reached.indptr), shape=reached.shape)
    found.eliminate_zeros()
    return found


def _root(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.sqrt(np.abs(x)), x)


def displacements(graph: sp.csr_array, positions: np.ndarray) -> np.ndarray:
    """Return the expected displacement of each cell, `[cells, 2]`; see `project`.

    Args:
        graph: cosines.
        positions: y, `[cells, 2]`.
    """
    largest = np.maximum(graph.max(1).toarray().ravel(), 0)
    stay = np.expm1(WEIGHT * np.clip(np.percentile(largest, 98) - largest, 0, 1))
    found = np.zeros_like(positions)
    for cell in range(len(positions)):
        entries = slice(graph.indptr[cell], graph.indptr[cell + 1])
        others, values = graph.indices[entries], graph.data[entries]
        weights = np.sign(values) * np.expm1(WEIGHT * np.abs(values))
        total = np.abs(weights[others != cell]).sum() + stay[cell]
        weights, others = weights[others != cell], others[others != cell]
        if not len(others):
            continue
        weights = weights / total
        step = positions[others] - positions[cell]
        step /= np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-30)
        found[cell] = weights @ step - weights.mean() * step.sum(0)
    return found
