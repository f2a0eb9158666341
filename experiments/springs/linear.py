"""What a causal mask does to the best linear fields, in closed form: no training, no noise.

Trajectories are taken as Gaussian with the covariance C of the training ones, so p_σ = N(0, Σ) with Σ = C + σ²I, and
fields as f(x) = -A x. The score has A = Σ⁻¹. Under the mask A is block lower triangular, a block a point of time. Then

- Flux Matching has loss 0 exactly where p_σ stays in place, AΣ + ΣAᵀ = 2I. With Σ = LLᵀ and M = L⁻¹AL that is
  M + Mᵀ = 2 L⁻¹L⁻ᵀ, which a lower triangular M solves: such fields exist for every Σ;
- score matching takes the projection, point by point the score given the past alone: A's rows are those of the inverse
  of Σ's leading blocks. Its p_σ does not stay in place.

Samples of the reverse VE sampler are then Gaussian too, and their W2 to N(0, C) is Bures'.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from experiments.common.distances import bures_wasserstein2
from experiments.common.run import Run
from fluxmatching import log_sigma_grid

Matrix = Callable[[Tensor, int], Tensor]
SCORE, FLUX, DSM = "score", "flux, causal", "DSM, causal"


def score_matrix(covariance: Tensor, block: int) -> Tensor:
    """Σ⁻¹."""
    return torch.linalg.inv(covariance)


def flux_matrix(covariance: Tensor, block: int) -> Tensor:
    """The lower triangular A with AΣ + ΣAᵀ = 2I."""
    lower = torch.linalg.cholesky(covariance)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    precision = inverse @ inverse.T
    return lower @ (2 * precision.tril(-1) + precision.diag().diag()) @ inverse


def dsm_matrix(covariance: Tensor, block: int) -> Tensor:
    """The block lower triangular A that is nearest to the score, E|Ax - Σ⁻¹x|² being least."""
    found = torch.zeros_like(covariance)
    for end in range(block, len(covariance) + 1, block):
        inverse = torch.linalg.inv(covariance[:end, :end])
        found[end - block : end, :end] = inverse[end - block :]
    return found


FIELDS: dict[str, Matrix] = {SCORE: score_matrix, FLUX: flux_matrix, DSM: dsm_matrix}


def noised(covariance: Tensor, sigma: float) -> Tensor:
    """Σ of p_σ."""
    return covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)


def size(matrix: Tensor, covariance: Tensor, sigma: float) -> float:
    """σ times the root mean square of a coordinate of f under N(0, covariance); near 1 for a score at large σ."""
    return float(sigma * ((matrix @ covariance) * matrix).sum().div(len(matrix)).sqrt())


def generated(field: Matrix, covariance: Tensor, block: int, sigmas: Tensor) -> Tensor:
    """Covariance of what the reverse VE sampler makes of N(0, σ_0² I)."""
    found = sigmas[0] ** 2 * torch.eye(len(covariance), dtype=covariance.dtype)
    for sigma, lower in pairwise(sigmas.tolist()):
        variance = sigma**2 - lower**2
        step = torch.eye(len(covariance), dtype=covariance.dtype) - variance * field(noised(covariance, sigma), block)
        found = step @ found @ step.T + variance * torch.eye(len(covariance), dtype=covariance.dtype)
    return found


def study(run: Run, samples: Tensor) -> None:
    """Rows "linear" (W2 by number of steps) and "linear size" (size of the field by σ), unless they are there."""
    if run.rows("linear size"):
        return
    config, block = run.config, samples.shape[-1]
    flat = samples.flatten(1).double().cpu()
    covariance = flat.T.cov()
    logged = {(row["field"], row["steps"]) for row in run.rows("linear")}
    for name, field in FIELDS.items():
        for steps in (config.sampling_steps, 3 * config.sampling_steps, 9 * config.sampling_steps):
            if (name, steps) not in logged:
                sigmas = log_sigma_grid(steps, config.sigma_min, config.sigma_max)
                made = generated(field, covariance, block, sigmas)
                run.log(kind="linear", field=name, steps=steps, w2=bures_wasserstein2(made, covariance) ** 0.5)
    for sigma in np.geomspace(0.01, 10.0, 13).tolist():
        total = noised(covariance, sigma)
        sizes = {name: size(field(total, block), total, sigma) for name, field in FIELDS.items()}
        for name, found in sizes.items():
            run.log(kind="linear size", field=name, sigma=sigma, size=found)
