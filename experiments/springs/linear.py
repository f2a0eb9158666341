"""What a causal mask does to linear fields, in closed form: no training, no noise.

Trajectories are taken as Gaussian with the covariance C of the training ones, so p_σ = N(0, Σ) with Σ = C + σ²I, and
fields as f(x) = -A x. The score has A = Σ⁻¹. Under the mask A is block lower triangular, a block a point of time. Then

- Flux Matching has loss 0 exactly where p_σ stays in place, AΣ + ΣAᵀ = 2I. With Σ = LLᵀ and M = L⁻¹AL that is
  M + Mᵀ = 2 L⁻¹L⁻ᵀ, which block lower triangular M solve: such fields exist for every Σ. Taken here is the one whose M
  has symmetric blocks on its diagonal;
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
SIGMAS = [round(sigma, 12) for sigma in np.geomspace(0.01, 10.0, 13).tolist()]


def score_matrix(covariance: Tensor, block: int) -> Tensor:
    """Σ⁻¹."""
    return torch.linalg.inv(covariance)


def flux_matrix(covariance: Tensor, block: int) -> Tensor:
    """A block lower triangular A with AΣ + ΣAᵀ = 2I."""
    lower, inverse = _cholesky(covariance)
    metric = inverse @ inverse.T
    time = torch.arange(len(metric)) // block
    below = (time[:, None] > time).to(metric)
    within = (time[:, None] == time).to(metric)
    return lower @ ((2 * below + within) * metric) @ inverse


def dsm_matrix(covariance: Tensor, block: int) -> Tensor:
    """The block lower triangular A that is nearest to the score, E|Ax - Σ⁻¹x|² being least."""
    _, inverse = _cholesky(covariance)
    # The last rows of the inverse of a leading part of Σ = LLᵀ are those of L⁻¹, times the last block of L⁻ᵀ.
    parts = [slice(start, start + block) for start in range(0, len(covariance), block)]
    return torch.cat([inverse[part, part].T @ inverse[part] for part in parts])


def _cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """L and L⁻¹."""
    lower = torch.linalg.cholesky(covariance)
    return lower, torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)


FIELDS: dict[str, Matrix] = {SCORE: score_matrix, FLUX: flux_matrix, DSM: dsm_matrix}


def noised(covariance: Tensor, sigma: float) -> Tensor:
    """Σ of p_σ."""
    return covariance + sigma**2 * torch.eye(len(covariance)).to(covariance)


def size(matrix: Tensor, covariance: Tensor, sigma: float) -> float:
    """σ times the root mean square of a coordinate of f under N(0, covariance); near 1 for a score at large σ."""
    return float(sigma * ((matrix @ covariance) * matrix).sum().div(len(matrix)).sqrt())


def generated(field: Matrix, covariance: Tensor, block: int, sigmas: Tensor) -> Tensor:
    """Covariance of what `fluxmatching.reverse_ve` makes of N(0, σ_0² I): no noise is added in its last step."""
    identity = torch.eye(len(covariance)).to(covariance)
    found, last = sigmas[0] ** 2 * identity, float(sigmas[-1])
    for sigma, lower in pairwise(sigmas.tolist()):
        variance = sigma**2 - lower**2
        step = identity - variance * field(noised(covariance, sigma), block)
        found = step @ found @ step.T + (variance if lower > last else 0.0) * identity
    return found


def study(run: Run, samples: Tensor) -> None:
    """Rows "linear" (W2 by number of steps) and "linear size" (size of the field by σ), those that are not there."""
    config, block = run.config, samples.shape[-1]
    covariance = samples.flatten(1).double().cpu().T.cov()
    done = {(row["field"], row["steps"]) for row in run.rows("linear")}
    wanted = [(name, k * config.sampling_steps) for name in FIELDS for k in (1, 3, 9)]
    for name, steps in run.bar([key for key in wanted if key not in done], "linear fields"):
        sigmas = log_sigma_grid(steps, config.sigma_min, config.sigma_max)
        made = generated(FIELDS[name], covariance, block, sigmas)
        run.log(kind="linear", field=name, steps=steps, w2=bures_wasserstein2(made, covariance))
    sized = {(row["field"], row["sigma"]) for row in run.rows("linear size")}
    for sigma in SIGMAS:
        total = noised(covariance, sigma)
        for name, field in FIELDS.items():
            if (name, sigma) not in sized:
                run.log(kind="linear size", field=name, sigma=sigma, size=size(field(total, block), total, sigma))
