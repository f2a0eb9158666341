"""The dual flux loss of a drift that is linear in its parameters, as a quadratic function of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.causal.drifts import Basis
from experiments.causal.fit import Quadratic
from fluxmatching.losses.dual import Features


def dual_quadratic(x: Tensor, basis: Basis, noise: float, features: Sequence[Features], ridge: float) -> Quadratic:
    """Return `dual_flux_loss` without halves as a function of θ.

    The loss has a diffusion with factor 2: its field is f 2/σ². With test functions φ_k the means g_k = E[L_f φ_k] are
    A θ + c, and the loss is (A θ + c)ᵀ (G + ridge diag G)⁻¹ (A θ + c).

    Args:
        x: samples, `[n, d]`.
        basis: of the drift.
        noise: σ.
        features: families of test functions.
        ridge: relative to the diagonal of G.
    """
    values = basis(x) / len(x)
    found = [family.gradients(x, x) for family in features]
    counts = [family.laplacians.shape[1] for family in found]
    firsts = [sum(counts[:k]) for k in range(len(counts))]
    owners = torch.cat([family.owners + first for family, first in zip(found, firsts, strict=True)])
    amplitudes = torch.cat([family.amplitudes for family in found], 1)
    directions = torch.cat([family.directions for family in found])
    # g_k = Σ_r [owner_r = k] Σ_ip w_ri s_i θ_ip E[a_r b_p] 2/σ²
    terms = (2 / noise**2) * (directions * basis.scale)[:, :, None] * (amplitudes.T @ values)[:, None]
    matrix = terms.new_zeros(sum(counts), *terms.shape[1:]).index_add(0, owners, terms).flatten(1)
    offset = torch.cat([family.laplacians for family in found], 1).mean(0)
    products = (amplitudes.T @ amplitudes / len(x)) * (directions @ directions.T)
    rows = products.new_zeros(sum(counts), len(owners)).index_add(0, owners, products)
    product = rows.new_zeros(len(rows), len(rows)).index_add(1, owners, rows)
    factor = torch.linalg.cholesky(product + ridge * product.diagonal().diag())
    matrix = torch.linalg.solve_triangular(factor, matrix, upper=False)
    offset = torch.linalg.solve_triangular(factor, offset[:, None], upper=False)[:, 0]
    return Quadratic(matrix.T @ matrix, matrix.T @ offset, offset.square().sum())
