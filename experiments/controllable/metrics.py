"""The metrics of Sec. B.1 on a grid weighted with w ∝ p, and the two losses.

A perturbation is linear in θ, so the controls and their Jacobians are evaluated once per family
(`GridMetrics`); a field then costs a contraction and, for the mixing speed, one sparse factorization.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import eigsh, splu
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from experiments.controllable.fields import Controls, Family
from fluxmatching import Draws, FluxOptions, UniformHorizon, flux_target

Array = NDArray[np.float64]


class Grid:
    """`points` × `points` grid over [-limit, limit]² with weights w_i ∝ p(x_i) (Eq. 32).

    Attributes:
        x: the points `[n², 2]`, first coordinate slowest.
        corners: points at which four cells meet, `[(n-1)², 2]`: the cells are the squares centered on the points.
        weights: w `[n²]`, summing to one.
        log_density: log p `[n²]`.
        stream_unit: 1 / (h² Σ_j p(x_j)), which turns fluxes of p through faces into fluxes of w.
    """

    def __init__(self, mixture: GaussianMixture, points: int, limit: float) -> None:
        axis = torch.linspace(-limit, limit, points, dtype=mixture.means.dtype, device=mixture.means.device)
        middle = (axis[1:] + axis[:-1]) / 2
        self.points = points
        self.spacing = 2 * limit / (points - 1)
        self.x = torch.cartesian_prod(axis, axis)
        self.corners = torch.cartesian_prod(middle, middle)
        self.log_density = mixture.log_density(self.x)
        self.weights = self.log_density.softmax(0)
        self.stream_unit = float((-self.log_density.logsumexp(0)).exp()) / self.spacing**2


def observables(x: Tensor) -> Tensor:
    """Compute Φ = (x₁, x₂, ‖x‖, cos ∠x, sin ∠x) of Eq. 33: `[n, 2] -> [n, 5]`, the last two 0 at the origin."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.cat([x, norm, torch.where(norm > 0, x / norm, 0.0)], dim=-1)


def symmetrized_generator(grid: Grid, stream: Tensor | None = None) -> sparse.csc_matrix:
    """Build W^{½} (-L_f) W^{-½} with L_f = Δ + f·∇, W = diag w, by finite volumes: `[n², n²]`, null vector √w.

    Between neighbors i, j the generator has the rate [√(w_i w_j)/h² + F_ij/2] / w_i. The first part is
    Δ + s·∇. F is the flux of p u through the face the two cells share, the difference of the stream function
    at the face's two ends; it is antisymmetric and, the stream function being 0 on the boundary, sums to
    zero over the faces of every cell. So w is stationary exactly on the grid, not only as h → 0.

    With this scaling the entries stay moderate while w spans twenty orders of magnitude.

    Args:
        grid: n × n points with their weights.
        stream: Ψ with p u = J∇Ψ at `grid.corners`, `[(n-1)²]`; None is u = 0.
    """
    n = grid.points
    root = _root_weights(grid)
    node = np.arange(n * n).reshape(n, n)
    edges = (node[:-1], node[1:]), (node[:, :-1], node[:, 1:])  # along x₁, along x₂

    psi = np.zeros((n + 1, n + 1))
    if stream is not None:
        psi[1:-1, 1:-1] = stream.reshape(n - 1, n - 1).cpu().numpy() * grid.stream_unit
    # p u = (-∂₂Ψ, ∂₁Ψ): Ψ at a face's lower end minus its upper end, or at its right end minus its left end.
    fluxes = psi[1:-1, :-1] - psi[1:-1, 1:], psi[1:, 1:-1] - psi[:-1, 1:-1]

    rows, cols, entries = [], [], []
    diagonal = np.zeros(n * n)
    for (i, j), flux in zip(edges, fluxes, strict=True):
        i, j, flux = i.ravel(), j.ravel(), flux.ravel()
        skew = flux / (2 * root[i] * root[j])
        rows += [i, j]
        cols += [j, i]
        entries += [-1 / grid.spacing**2 - skew, -1 / grid.spacing**2 + skew]
        np.add.at(diagonal, i, root[j] / root[i] / grid.spacing**2)
        np.add.at(diagonal, j, root[i] / root[j] / grid.spacing**2)
    rows.append(node.ravel())
    cols.append(node.ravel())
    entries.append(diagonal)
    return sparse.csc_matrix((np.concatenate(entries), (np.concatenate(rows), np.concatenate(cols))))


def inverse_generator_form(grid: Grid, phi: Tensor, stream: Tensor | None = None) -> Array:
    """Solve -L_f ψ_φ = φ - E_w φ and return ⟨φ - E_w φ, ψ_φ⟩_w (Eq. 34), for functions φ `[n², P]`: `[P]`.

    No stream function can raise the value above that of the score field.
    """
    matrix, rhs = symmetrized_generator(grid, stream), _centered(grid, phi)
    # Constants are the null space on both sides, so one equation is redundant: fix the solution at the heaviest point
    # and drop the equation there. The product with the centered φ does not depend on the constant this adds.
    keep = np.delete(np.arange(len(rhs)), int(grid.weights.argmax()))
    solution = splu(matrix[keep][:, keep]).solve(rhs[keep])
    return np.asarray((rhs[keep] * solution).sum(0))


def _root_weights(grid: Grid) -> Array:
    return np.asarray(np.exp(0.5 * grid.log_density.log_softmax(0).cpu().numpy()))


def _centered(grid: Grid, phi: Tensor) -> Array:
    """Return √w (φ - E_w φ), `[n², P]`."""
    return _root_weights(grid)[:, None] * (phi - grid.weights @ phi).cpu().numpy()


def autocorrelation_times(grid: Grid, phi: Tensor, stream: Tensor | None = None) -> Array:
    """Compute integrated autocorrelation times τ_φ = 2⟨φ - E_w φ, ψ_φ⟩_w / Var_w(φ) (Eq. 35)."""
    mean = grid.weights @ phi
    variance = (grid.weights @ (phi - mean).square()).cpu().numpy()
    return np.asarray(2 * inverse_generator_form(grid, phi, stream) / variance)


def central_divergence(vectors: Tensor, grid: Grid) -> Tensor:
    """Compute ∇·u at the grid's points by central differences, one-sided on its boundary: `[n², K, 2] -> [n², K]`.

    Structure narrower than the spacing is lost: it lies between the points.
    """
    squares = vectors.unflatten(0, (grid.points, grid.points))
    parts = [torch.gradient(squares[..., i], spacing=grid.spacing, dim=i)[0] for i in range(2)]
    return (parts[0] + parts[1]).flatten(0, 1)


class GridMetrics:
    """All metrics of Sec. B.1 for the fields of one family.

    Args:
        controls: normalized controls.
        family: family that θ refers to.
        grid: points of the expectations under p.
    """

    def __init__(self, controls: Controls, family: Family, grid: Grid) -> None:
        self.family = family
        self.grid = grid
        x = grid.x.clone().requires_grad_(True)
        basis = controls.basis(x, family)
        columns = [
            torch.autograd.grad(basis[:, k, i].sum(), x, retain_graph=True)[0] for k in range(3) for i in range(2)
        ]
        jacobian = torch.stack(columns, dim=1).unflatten(1, (3, 2))  # ∂_j c_{k,i}, [n², 3, 2, 2]
        self.basis = basis.detach()
        self.curl = jacobian[..., 0, 1] - jacobian[..., 1, 0]
        divergence = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
        along_score = (self.basis * controls.mixture.score(grid.x).unsqueeze(1)).sum(-1)
        self.residuals = divergence + along_score
        self.grid_residuals = central_divergence(self.basis, grid) + along_score
        self.phi = observables(grid.x)
        self.streams = controls.stream(grid.corners)

    def mean(self, values: Tensor) -> float:
        """Compute E_w[values], values `[n²]`."""
        return float(self.grid.weights @ values)

    def score_matching_loss(self, theta: Tensor) -> float:
        """Compute L_SM = ½ E_w ‖u_θ‖² (Eq. 39)."""
        return 0.5 * self.mean(self._perturbation(theta).square().sum(-1))

    def mixing(self, theta: Tensor) -> float:
        """Compute M_mix, the reciprocal of the observables' mean τ_φ (Eq. 35), defined for fields that keep p."""
        if self.family != "preserving":
            raise ValueError("the mixing speed takes p as stationary: only the preserving family has it")
        return float(1 / autocorrelation_times(self.grid, self.phi, self.streams @ theta).mean())

    def triangle(self, theta: Tensor) -> float:
        """Compute M_tri, the cosine between u_θ and c_tri under w (Eq. 36); 0 for the score field, whose u_θ is 0."""
        u, c = self._perturbation(theta), self.basis[:, 1]
        norms = self.mean(u.square().sum(-1)) * self.mean(c.square().sum(-1))
        return self.mean((u * c).sum(-1)) / norms**0.5 if norms > 0 else 0.0

    def skewness(self, theta: Tensor) -> float:
        """Compute M_skew = ½ E_w (∂₂u₁ - ∂₁u₂)² (Eq. 37)."""
        return 0.5 * self.mean((self.curl @ theta).square())

    def violation(self, theta: Tensor) -> float:
        """Compute V = (E_w r²)^½ with r = ∇·u + u·s (Eq. 38)."""
        return self.mean((self.residuals @ theta).square()) ** 0.5

    def grid_violation(self, theta: Tensor) -> float:
        """Compute V with ∇·u by central differences on the grid, as the published program does."""
        return self.mean((self.grid_residuals @ theta).square()) ** 0.5

    def projected_fisher(self, thetas: Tensor, horizon: float = math.inf) -> Array:
        """Compute ∫₀ᵀ E[r(x_0) r(x_t)] dt, which is J̃ of Eq. 4 and 5 for T = ∞: `[F, 3] -> [F]`.

        Beyond T only slow modes are left, so Σ_k e^{-λ_k T} ⟨r, v_k⟩² / λ_k over the slowest is subtracted.
        """
        residuals = self.residuals @ thetas.T
        matrix = symmetrized_generator(self.grid)
        # The start vector makes the solver deterministic. The slowest mode of all is the constant.
        rates, modes = eigsh(matrix, k=min(25, matrix.shape[0] - 1), sigma=-0.1, v0=np.ones(matrix.shape[0]))
        slow = np.argsort(rates)[1:]
        rates, modes = rates[slow], modes[:, slow]
        rest = np.exp(-rates * horizon) / rates @ (modes.T @ _centered(self.grid, residuals)) ** 2
        return np.asarray(inverse_generator_form(self.grid, residuals) - rest)

    def all(self, theta: Tensor) -> dict[str, float | None]:
        """Return every metric by its name in `metrics.jsonl`; the mixing speed is None where it is not defined."""
        return {
            "mixing": self.mixing(theta) if self.family == "preserving" else None,
            "triangle": self.triangle(theta),
            "skewness": self.skewness(theta),
            "violation": self.violation(theta),
            "grid_violation": self.grid_violation(theta),
            "score_matching_loss": self.score_matching_loss(theta),
        }

    def _perturbation(self, theta: Tensor) -> Tensor:
        return (theta[:, None] * self.basis).sum(1)


def flux_losses(
    controls: Controls,
    theta: Tensor,
    family: Family,
    batch: int,
    minibatches: int,
    generator: torch.Generator,
    backend: str | None = None,
    second_derivatives: str = "closed_form",
) -> Tensor:
    """Estimate the Flux Matching loss of f_θ (Eq. 6) by Monte Carlo, once per minibatch: `[minibatches]`.

    The minibatches are the groups of one call. p_σ is itself a kernel density estimate with the component means as
    reference points and bandwidth² ν², so nothing of the score is estimated. The starting points are component means,
    to which the call adds ν n₀. Eq. 8 with ν² in place of σ² is exact within a component.

    Args:
        controls: normalized controls.
        theta: θ, `[3]`.
        family: family that θ refers to.
        batch: points per minibatch.
        minibatches: number of minibatches.
        generator: generator of all random numbers, on the CPU.
        backend, second_derivatives: see `FluxOptions`.
    """
    mixture = controls.mixture
    field = controls.field(theta, family)
    shape = (batch, minibatches, 2)
    means = mixture.sample_means(shape[:-1], generator)
    normal = torch.randn((5, *shape), dtype=torch.float64, generator=generator).to(means)
    tau = 4 * torch.rand(minibatches, dtype=torch.float64, generator=generator).to(means)
    options = FluxOptions(
        grouped=True,
        horizon=UniformHorizon(),
        divergence="exact",
        second_derivatives=second_derivatives,
        backend=backend,
    )
    target = flux_target(
        field,
        means,
        math.sqrt(mixture.variance),
        options,
        refs=mixture.means.unsqueeze(1).expand(-1, minibatches, -1),
        draws=Draws(tau=tau, start=normal[0], chain=normal[1:], probe=None),
    )
    with torch.no_grad():
        return target.terms(field).sum(-1).mean(0)
