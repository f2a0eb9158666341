"""Gaussian images of two parts in closed form: which linear fields keep the dependence of the parts.

The left part is a smooth normal image with covariance K; the right part is its mirror image plus δ times another such
image. With noise the covariance is Σ = C + σ² I, and a linear field f(x) = -A x has the stationary covariance S of
AS + SAᵀ = 2I (S = Σ if it leaves p_σ in place). Under the mask A is block lower triangular with the left part first:

- Flux Matching: such an A with AΣ + ΣAᵀ = 2I exists for every Σ.
- Score matching: the rows of the left block are the score of the left part alone, those of the right block are the
  score. With the left part moving by itself and the right one as if it stood still, S has a weaker dependence.
"""

from __future__ import annotations

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from experiments.common.distances import bures_wasserstein2
from experiments.common.run import Run
from experiments.regions.images import SIZE
from experiments.springs import linear
from fluxmatching import exponential_schedule

BLOCK = SIZE * SIZE  # pixels of a part
LENGTH, DELTA, JITTER = 1.5, 0.7, 1e-3  # correlation length, δ, and variance of independent noise of the pixels
LEVELS = (0.1, 0.3, 1.0, 3.0)
SIGMA_MIN, SIGMA_MAX = 0.02, 80.0  # of the reverse VE sampler: far below the noise of the pixels, far above the image
FACTORS = (1, 4, 16)  # of the number of sampling steps
SCORE, FLUX, DSM = "score", "flux, masked", "score matching, masked"
FIELDS: dict[str, linear.Matrix] = {SCORE: linear.score_matrix, FLUX: linear.flux_matrix, DSM: linear.dsm_matrix}


def flip_matrix() -> Tensor:
    """Permutation that mirrors a flattened part, `[64, 64]`, float64."""
    order = torch.arange(BLOCK).reshape(SIZE, SIZE).flip(1).flatten()
    return torch.eye(BLOCK).double()[order]


def image_covariance() -> Tensor:
    """C, `[128, 128]`, float64, the left part first."""
    axis = torch.arange(SIZE).double()
    place = torch.cartesian_prod(axis, axis)
    smooth = (torch.cdist(place, place).square() / (-2 * LENGTH**2)).exp()
    cross = smooth @ flip_matrix().T
    covariance = torch.cat([torch.cat([smooth, cross], 1), torch.cat([cross.T, (1 + DELTA**2) * smooth], 1)])
    return covariance + JITTER * torch.eye(2 * BLOCK).double()


def part_correlation(covariance: Tensor) -> float:
    """Correlation of a pixel of the right part with its mirror image, from averages over the pixels."""
    left, right = covariance[:BLOCK, :BLOCK], covariance[BLOCK:, BLOCK:]
    cross = (covariance[BLOCK:, :BLOCK] * flip_matrix()).sum()
    return (cross / (left.trace() * right.trace()).sqrt()).item()


def stationary(matrix: Tensor) -> Tensor:
    """S with AS + SAᵀ = 2I."""
    found = solve_continuous_lyapunov(matrix.numpy(), 2 * torch.eye(len(matrix)).double().numpy())
    return torch.from_numpy(found)


def study(run: Run) -> None:
    """Log missing rows "stationary" (by σ) and "generated" (by number of steps of the reverse VE sampler)."""
    covariance = image_covariance()
    done = {(row["field"], row["sigma"]) for row in run.rows("stationary")}
    for sigma in LEVELS:
        total = linear.noised(covariance, sigma)
        for name, field in FIELDS.items():
            if (name, sigma) in done:
                continue
            matrix = field(total, BLOCK)
            found = stationary(matrix)
            run.log(
                kind="stationary", field=name, sigma=sigma, w2=bures_wasserstein2(found, total),
                correlation=part_correlation(found), truth=part_correlation(total),
                size=linear.size(matrix, total, sigma), seen=matrix[:BLOCK, BLOCK:].abs().max(),
            )  # fmt: skip
    done = {(row["field"], row["steps"]) for row in run.rows("generated")}
    for name, field in FIELDS.items():
        for steps in (factor * run.config.sampling_steps for factor in FACTORS):
            if (name, steps) in done:
                continue
            sigmas = exponential_schedule(steps, SIGMA_MIN, SIGMA_MAX)
            found = linear.generated(field, covariance, BLOCK, sigmas)
            run.log(
                kind="generated", field=name, steps=steps, w2=bures_wasserstein2(found, covariance),
                correlation=part_correlation(found), truth=part_correlation(covariance),
            )  # fmt: skip
