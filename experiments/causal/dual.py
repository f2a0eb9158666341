"""The dual flux loss of a drift that is linear in its parameters, as a quadratic function of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.causal.drifts import Basis
from experiments.causal.fit import Quadratic
from fluxmatching.losses.dual import Features, concatenate


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
    found = concatenate([family.gradients(x, x) for family in features])
    # g_k = Σ_r [owner_r = k] Σ_ip w_ri s_i θ_ip E[a_r b_p] 2/σ²
    terms = (2 / noise**2) * (found.directions * basis.scale)[:, :, None] * (found.amplitudes.T @ values)[:, None]
    product, offset = found.gram(), found.laplacians.mean(0)
    matrix = terms.new_zeros(len(product), *terms.shape[1:]).index_add(0, found.owners, terms).flatten(1)
    factor = torch.linalg.cholesky(product + ridge * product.diagonal().diag())
    matrix = torch.linalg.solve_triangular(factor, matrix, upper=False)
    offset = torch.linalg.solve_triangular(factor, offset[:, None], upper=False)[:, 0]
    return Quadratic(matrix.T @ matrix, matrix.T @ offset, offset.square().sum())
