"""The effect of a causal mask on linear fields, in closed form: no training, no noise.

Trajectories are modeled as Gaussian with the covariance C of the training ones, so p_σ = N(0, Σ) with Σ = C + σ²I.
Fields are f(x) = -A x; the score has A = Σ⁻¹. Under the mask A is block lower triangular, one block per time point.

- Flux Matching has loss 0 exactly if the field preserves p_σ: AΣ + ΣAᵀ = 2I. With Σ = LLᵀ and M = L⁻¹AL this is
  M + Mᵀ = 2 L⁻¹L⁻ᵀ. Block lower triangular M solve it, so such fields exist for every Σ. This module uses the one whose
  M has symmetric blocks on its diagonal.
- Score matching finds the projection, the score of each time point given the past alone: the rows of A are those of the
  inverses of Σ's leading blocks. This field does not preserve p_σ.

Samples of both samplers are Gaussian as well; their W2 to N(0, C) is the Bures distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from experiments.common.distances import bures_wasserstein2
from experiments.common.run import Run
from fluxmatching import exponential_schedule

Matrix = Callable[[Tensor, int], Tensor]
SCORE, FLUX, DSM = "score", "flux, causal", "DSM, causal"
SIGMAS = [round(sigma, 12) for sigma in np.geomspace(0.01, 10.0, 13).tolist()]


def score_matrix(covariance: Tensor, block: int) -> Tensor:
    """Σ⁻¹."""
    return torch.linalg.inv(covariance)


def flux_matrix(covariance: Tensor, block: int) -> Tensor:
    """Block lower triangular A with AΣ + ΣAᵀ = 2I."""
    lower, inverse = _cholesky(covariance)
    metric = inverse @ inverse.T
    time = torch.arange(len(metric)) // block
    below = (time[:, None] > time).to(metric)
    within = (time[:, None] == time).to(metric)
    return lower @ ((2 * below + within) * metric) @ inverse


def dsm_matrix(covariance: Tensor, block: int) -> Tensor:
    """Block lower triangular A nearest to the score: the one with the least E|Ax - Σ⁻¹x|²."""
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


def generated(field: Matrix, covariance: Tensor, block: int, sigmas: Tensor, sampler: str = "reverse") -> Tensor:
    """Covariance of the samples made from N(0, σ_0² I) by a sampler of `sampling.py`.

    "reverse" is `fluxmatching.reverse_ve`, whose last step adds no noise; "ode" is `euler_flow`, which never adds any.
    """
    identity = torch.eye(len(covariance)).to(covariance)
    found, last = sigmas[0] ** 2 * identity, float(sigmas[-1])
    for sigma, lower in pairwise(sigmas.tolist()):
        variance = sigma**2 - lower**2
        length = variance if sampler == "reverse" else sigma**2 * math.log(sigma / lower)
        step = identity - length * field(noised(covariance, sigma), block)
        noisy = sampler == "reverse" and lower > last
        found = step @ found @ step.T + (variance if noisy else 0.0) * identity
    return found


def study(run: Run, samples: Tensor) -> None:
    """Log missing rows "linear" (W2 by number of steps) and "linear size" (size of the field by σ)."""
    config, block = run.config, samples.shape[-1]
    covariance = samples.flatten(1).double().cpu().T.cov()
    done = {(row["field"], row["steps"]) for row in run.rows("linear")}
    wanted = [(name, k * config.sampling_steps) for name in FIELDS for k in (1, 3, 9)]
    for name, num_steps in run.bar([key for key in wanted if key not in done], "linear fields"):
        sigmas = exponential_schedule(num_steps, config.sigma_min, config.sigma_max)
        made = generated(FIELDS[name], covariance, block, sigmas, config.sampler)
        run.log(kind="linear", field=name, steps=num_steps, w2=bures_wasserstein2(made, covariance))
    sized = {(row["field"], row["sigma"]) for row in run.rows("linear size")}
    for sigma in SIGMAS:
        total = noised(covariance, sigma)
        for name, field in FIELDS.items():
            if (name, sigma) not in sized:
                run.log(kind="linear size", field=name, sigma=sigma, size=size(field(total, block), total, sigma))
