"""Fields that carry one Gaussian path, in closed form: no training, no noise.

Noise x0 ~ N(0, I) and data x1 ~ N(0, S) are jointly normal with E[x1 x0ᵀ] = C. Then x_t = t x1 + (1-t) x0 has the
covariance Σ = t² S + t (1-t) (C + Cᵀ) + (1-t)² I, and with N = E[(x1 - x0) x_tᵀ] its derivative is Σ' = N + Nᵀ. A
linear field f(x) = F x carries p_t exactly if FΣ + ΣFᵀ = Σ'. In the plane these are three equations for four numbers:

- F = N Σ⁻¹, the marginal velocity E[x1 - x0 | x_t], which conditional flow matching finds. Not symmetric if C is not.
- F symmetric, the solution of a Lyapunov equation. If f and g carry p_t, then ∇·(p (g - f)) = 0. If also f = ∇φ, then
  E f·(g - f) = -∫ φ ∇·(p (g - f)) = 0 and E|g|² = E|f|² + E|g - f|²: of all fields, linear or not, f has the least
  kinetic energy.
- F lower triangular: with Σ = LLᵀ, F = L'L⁻¹, which moves the first coordinate by itself (Knothe-Rosenblatt transport).

Conditional flow matching of a lower triangular F finds each row's best prediction instead, which does not carry p_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.distances import bures_wasserstein2
from experiments.common.run import Run
from fluxmatching import ODESolver, integrate_flow

Matrix = Callable[[Tensor, Tensor], Tensor]
VELOCITY, LEAST, CAUSAL, MASKED = "velocity", "least energy", "causal", "velocity, masked"
CARRYING = (VELOCITY, LEAST, CAUSAL)
ACCURATE = ODESolver("dopri5", rtol=1e-10, atol=1e-10)
MIDPOINTS = 200  # times of the integral of the energy


@dataclass(frozen=True)
class GaussianPair:
    """Joint normal distribution of noise and data.

    Attributes:
        data: S, `[D, D]`.
        cross: C = E[x1 x0ᵀ], `[D, D]`.
    """

    data: Tensor
    cross: Tensor

    def covariance(self, t: float | Tensor) -> Tensor:
        """Return Σ."""
        identity = torch.eye(len(self.data)).to(self.data)
        return t**2 * self.data + t * (1 - t) * (self.cross + self.cross.T) + (1 - t) ** 2 * identity

    def product(self, t: float | Tensor) -> Tensor:
        """Return N = E[(x1 - x0) x_tᵀ]."""
        identity = torch.eye(len(self.data)).to(self.data)
        return t * self.data + (1 - t) * self.cross - t * self.cross.T - (1 - t) * identity


def velocity_matrix(product: Tensor, covariance: Tensor) -> Tensor:
    """N Σ⁻¹."""
    return torch.linalg.solve(covariance, product.T).T


def least_energy_matrix(product: Tensor, covariance: Tensor) -> Tensor:
    """Symmetric B with BΣ + ΣB = N + Nᵀ."""
    values, vectors = torch.linalg.eigh(covariance)
    rate = vectors.T @ (product + product.T) @ vectors
    return vectors @ (rate / (values + values.unsqueeze(-1))) @ vectors.T


def causal_matrix(product: Tensor, covariance: Tensor) -> Tensor:
    """Lower triangular F with FΣ + ΣFᵀ = N + Nᵀ: with Σ = LLᵀ, L⁻¹FL + (L⁻¹FL)ᵀ = L⁻¹(N + Nᵀ)L⁻ᵀ."""
    lower = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(lower, product + product.T, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.T, upper=False)
    inner = inner.tril(-1) + inner.diagonal().diag() / 2
    return torch.linalg.solve_triangular(lower, lower @ inner, upper=False, left=False)


def masked_matrix(product: Tensor, covariance: Tensor) -> Tensor:
    """Rows of the best prediction of x1 - x0 from the first one, two, ... coordinates of x_t."""
    rows = torch.zeros_like(covariance)
    for row in range(len(covariance)):
        seen = slice(row + 1)
        rows[row, seen] = torch.linalg.solve(covariance[seen, seen], product[row, seen])
    return rows


FIELDS: dict[str, Matrix] = {
    VELOCITY: velocity_matrix,
    LEAST: least_energy_matrix,
    CAUSAL: causal_matrix,
    MASKED: masked_matrix,
}


def rotation(degrees: float) -> Tensor:
    """Rotation of the plane, `[2, 2]`."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def make_pair(correlation: float) -> GaussianPair:
    """Make the pair of this experiment: a long and a short axis, and a coupling with a quarter turn, C = ρ S^½ J."""
    axes = rotation(30)
    root = axes @ torch.tensor([2.0, 0.5], dtype=torch.float64).diag() @ axes.T
    return GaussianPair(root @ root, correlation * root @ rotation(90))


def energy(matrix: Matrix, pair: GaussianPair) -> float:
    """∫ E|F x|² dt = ∫ tr(FΣFᵀ) dt."""
    total = 0.0
    for k in range(MIDPOINTS):
        t = (k + 0.5) / MIDPOINTS
        covariance = pair.covariance(t)
        found = matrix(pair.product(t), covariance)
        total += ((found @ covariance) * found).sum().item()
    return total / MIDPOINTS


def trajectory(matrix: Matrix, pair: GaussianPair, x: Tensor, times: Tensor, solver: ODESolver = ACCURATE) -> Tensor:
    """Integrate dx/dt = F x from x `[N, D]` at times[0]: `[K, N, D]`."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return x @ matrix(pair.product(t[0]), pair.covariance(t[0])).T  # all at one time

    return integrate_flow(field, x, times=times, solver=solver)


def distances(matrix: Matrix, pair: GaussianPair, times: Tensor, solver: ODESolver = ACCURATE) -> list[float]:
    """W2 between p_t and the distribution to which the field carries N(0, I), at all times but the first."""
    unit_vectors = torch.eye(len(pair.data)).to(pair.data)
    carried = trajectory(matrix, pair, unit_vectors, times, solver)[1:]
    return [
        bures_wasserstein2(images.T @ images, pair.covariance(t))
        for images, t in zip(carried, times[1:].tolist(), strict=True)
    ]


def study(run: Run, pair: GaussianPair, times: Tensor) -> None:
    """Log missing rows "gaussian": energy, largest W2 along the path, and W2 at its end by Euler steps (None: all)."""
    done = {(row["field"], row["steps"]) for row in run.rows("gaussian")}
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name, matrix in FIELDS.items():
        if (name, None) not in done:
            w2 = max(distances(matrix, pair, times))
            run.log(kind="gaussian", field=name, steps=None, w2=w2, energy=energy(matrix, pair))
        for steps in run.config.euler_steps:
            if (name, steps) not in done:
                (w2,) = distances(matrix, pair, ends, ODESolver("euler", num_steps=steps))
                run.log(kind="gaussian", field=name, steps=steps, w2=w2)
