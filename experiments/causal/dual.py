"""The dual flux loss of a drift that is linear in its parameters, as a quadratic function of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.causal.drifts import Basis
from fluxmatching import CosineFeatures
from fluxmatching.losses.dual import centered


@dataclass(frozen=True)
class Cosines:
    """Means of K test functions φ_k with ∇φ_k = a_k w_k, beside the linear and quadratic ones. U as in `Dual`.

    Attributes:
        directions: w, `[K, d]`.
        turned: Uᵀw, `[K, d]`.
        means: E a, `[K]`.
        moments: E a Uᵀ(x - μ), `[K, d]`.
        products: E a b, `[K, P]`.
        laplacians: E Δφ, `[K]`.
        factor: Cholesky factor of the part of G that the linear and quadratic functions do not explain, `[K, K]`.
    """

    directions: Tensor
    turned: Tensor
    means: Tensor
    moments: Tensor
    products: Tensor
    laplacians: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Dual:
    """`dual_flux_loss` without halves over linear, quadratic and perhaps cosine test functions.

    The loss has a diffusion with factor 2: its field is F = f 2/σ². With m = E b, S = E b (x - μ)ᵀ, C = E F (x - μ)ᵀ,
    M = C + Cᵀ + 2I and the covariance with its ridge U diag(λ) Uᵀ, the linear and quadratic functions have

        |E F|²/(1 + ridge) + ½ Σ_kl (UᵀMU)²_kl/(λ_k + λ_l)

    and the others h·G⁻¹h, h the part of their means E[F·∇φ + Δφ], and G that of their Gram matrix, which those do not
    explain.

    Attributes:
        basis: of the drift.
        factors: 2 scale/σ², `[d]`.
        mean: m, `[P]`.
        moments: S U, `[P, d]`.
        vectors: U, `[d, d]`.
        inverse: 1/(λ_k + λ_l), `[d, d]`.
        shrink: 1/(1 + ridge).
        cosines: further test functions.
        linear, constant: as in `Quadratic`.
    """

    basis: Basis
    factors: Tensor
    mean: Tensor
    moments: Tensor
    vectors: Tensor
    inverse: Tensor
    shrink: float
    cosines: Cosines | None
    linear: Tensor
    constant: Tensor

    def slope(self, theta: Tensor) -> Tensor:
        """Return half the gradient at θ, `[Q]`; time P d² and K P d."""
        return self.slope_and_value(theta)[0]

    def slope_and_value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return half the gradient at θ, and the value there."""
        full, U = self.factors[:, None] * self.basis.full(theta), self.vectors
        velocity = full @ self.mean
        mixed = U.T @ (full @ self.moments)
        moved = mixed + mixed.T + 2 * torch.eye(len(U), dtype=U.dtype)
        solved = self.inverse * moved
        value = self.shrink * velocity.square().sum() + 0.5 * (solved * moved).sum()
        cosines = self.cosines
        pushed = torch.zeros_like(full)
        if cosines is not None:
            w, t = cosines.turned, cosines.moments
            h = (cosines.directions * (cosines.products @ full.T)).sum(1) + cosines.laplacians
            h = h - self.shrink * cosines.means * (cosines.directions @ velocity) - ((w @ solved) * t).sum(1)
            u = torch.cholesky_solve(h[:, None], cosines.factor)[:, 0]
            value = value + h @ u
            crossed = w.T @ (u[:, None] * t)
            solved = solved - self.inverse * (crossed + crossed.T)
            velocity = velocity - cosines.directions.T @ (u * cosines.means)
            pushed = cosines.directions.T @ (u[:, None] * cosines.products)
        gradient = self.shrink * velocity[:, None] * self.mean + U @ solved @ self.moments.T + pushed
        return (self.factors[:, None] * gradient)[self.basis.entries], value

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of H, `[R, C]`; time P² d² and R C d.

        For F = b_p e_i and F' = b_q e_j the linear and quadratic functions give, with S turned by U,
        δ_ij m_p m_q/(1 + ridge) + Σ_kl U_ik S_pl (U_jk S_ql + S_qk U_jl)/(λ_k + λ_l).
        """
        i, p = (index[rows] for index in self.basis.entries)
        j, q = (index[columns] for index in self.basis.entries)
        U, S = self.vectors, self.moments
        found = (i[:, None] == j) * (self.shrink * self.mean[p][:, None] * self.mean[q])
        used, place = q.unique(return_inverse=True)
        for function in p.unique().tolist():
            here = p == function
            summed = (S[function] * S[used]) @ self.inverse
            found[here] += U[i[here]] @ (U[j] * summed[place]).T
        for entry in i.unique().tolist():
            here = i == entry
            summed = (U[entry] * S[used]) @ self.inverse
            found[here] += S[p[here]] @ (U[j] * summed[place]).T
        if self.cosines is not None:
            left = torch.linalg.solve_triangular(self.cosines.factor, self._columns(i, p), upper=False)
            right = left
            if not torch.equal(rows, columns):
                right = torch.linalg.solve_triangular(self.cosines.factor, self._columns(j, q), upper=False)
            found += left.T @ right
        return self.factors[i][:, None] * found * self.factors[j]

    def _columns(self, i: Tensor, p: Tensor) -> Tensor:
        """Return the part h of the means of the cosines for fields b_p e_i, `[K, R]`."""
        cosines = self.cosines
        assert cosines is not None
        w, t = cosines.turned, cosines.moments
        found = cosines.directions[:, i] * (
            cosines.products[:, p] - self.shrink * cosines.means[:, None] * self.mean[p]
        )
        for entry in i.unique().tolist():
            here, row = i == entry, self.vectors[entry]
            weights = ((w * row) @ self.inverse) * t + ((t * row) @ self.inverse) * w
            found[:, here] -= weights @ self.moments[p[here]].T
        return found


def dual_quadratic(x: Tensor, basis: Basis, noise: float, cosines: CosineFeatures | None, ridge: float) -> Dual:
    """Return `dual_flux_loss` over linear and quadratic functions and cosines, of the Q parameters of the drift.

    Args:
        x: samples, `[n, d]`.
        basis: of the drift.
        noise: σ.
        cosines: further test functions.
        ridge: relative to the diagonal of G.
    """
    values, about = basis(x), centered(x, x)
    covariance = about.T @ about / len(x)
    eigenvalues, vectors = torch.linalg.eigh(covariance + ridge * covariance.diagonal().diag())
    inverse, shrink = 1 / (eigenvalues[:, None] + eigenvalues), 1 / (1 + ridge)
    turned = about @ vectors
    nothing = torch.zeros(0, dtype=x.dtype)
    found = Dual(
        basis, 2 * basis.scale / noise**2, values.mean(0), values.T @ turned / len(x), vectors, inverse, shrink,
        None if cosines is None else _cosines(x, values, turned, vectors, inverse, cosines, ridge), nothing, nothing,
    )  # fmt: skip
    linear, constant = found.slope_and_value(torch.zeros(len(basis.entries[0]), dtype=x.dtype))
    return replace(found, linear=linear, constant=constant)


def _cosines(
    x: Tensor, values: Tensor, turned: Tensor, vectors: Tensor, inverse: Tensor, cosines: CosineFeatures, ridge: float
) -> Cosines:
    """Return the moments of the cosines, and what the linear and quadratic functions leave of their Gram matrix."""
    found = cosines.gradients(x, x)
    w, a = found.directions, found.amplitudes
    means, moments = a.mean(0), a.T @ turned / len(x)
    gram = found.gram()
    gram = gram + ridge * gram.diagonal().diag()
    gram -= (means[:, None] * means) * (w @ w.T) / (1 + ridge)
    crossed = (w @ vectors)[:, :, None] * moments[:, None]
    crossed = ((crossed + crossed.mT) * inverse.sqrt()).flatten(1)
    gram -= 0.5 * crossed @ crossed.T
    return Cosines(
        w, w @ vectors, means, moments, a.T @ values / len(x), found.laplacians.mean(0), torch.linalg.cholesky(gram)
    )
