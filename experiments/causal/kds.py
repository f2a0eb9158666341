"""Kernel deviation from stationarity (Lorch, Krause, Schölkopf 2024) as a quadratic function of the parameters.

For dx = f dt + σ dW let A φ = f·∇φ + (σ²/2) Δφ, whose mean is zero for every φ if x is stationary. For a kernel k

    KDS = E_{x,x'} A_x A_x' k(x, x') = sup over the unit ball of its function space of (E[A φ])².

Both kernels are made of Gaussians κ_i = exp(-z_i²/2ℓ²) of the differences z = (x - x')/s of standardized coordinates,
in which f is f/s and σ²/2 is D_i = σ²/(2 s_i²). With the derivatives κ_i^(m) = h_m κ_i in z_i and A = Σ_i A_i,

    A_i κ_i = (f_i h_1 + D_i h_2) κ_i,    A'_i κ_i = (-f'_i h_1 + D_i h_2) κ_i,
    A_i A'_i κ_i = (-f_i f'_i h_2 + D_i (f_i - f'_i) h_3 + D_i² h_4) κ_i.

All means are over all pairs of samples, a sample with itself included, so that the function is convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.causal.drifts import Basis
from experiments.causal.quadratic import Dense


@dataclass(frozen=True)
class GaussianKDS:
    """KDS for the Gaussian kernel k, the product of all κ_i, as a function of the Q parameters of the drift.

    A A' k/k = (Σ_i A_iκ_i/κ_i)(Σ_i A'_iκ_i/κ_i)
               + Σ_i [f_i f'_i/ℓ² + 2 D_i (f_i - f'_i) z_i/ℓ⁴ + D_i² (2/ℓ⁴ - 4 z_i²/ℓ⁶)].

    Attributes:
        basis: of the drift.
        y: standardized samples, `[n, d]`.
        values: of the basis, `[n, P]`.
        kernel: k/n², `[n, n]`.
        inverse: 1/ℓ².
        linear, constant: as in `Quadratic`.
    """

    basis: Basis
    y: Tensor
    values: Tensor
    kernel: Tensor
    inverse: float
    linear: Tensor
    constant: Tensor

    def slope(self, theta: Tensor) -> Tensor:
        """Return half the gradient at θ, `[Q]`; time n² d.

        The part quadratic in f is Σ_xx' k [u u'/ℓ⁴ + f·f'/ℓ²] with u = f·z and u' = -f'·z.
        """
        y, kernel = self.y, self.kernel
        drift = self.values @ self.basis.full(theta).T
        along = drift @ y.T
        weighted = kernel * (along.diagonal() - along.T)
        pulled = self.inverse**2 * (weighted.sum(1)[:, None] * y - weighted @ y) + self.inverse * (kernel @ drift)
        return (pulled.T @ self.values)[self.basis.entries] + self.linear

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of H, `[R, C]`; time n² P for each entry of the drift in the rows.

        For f = b_p e_i and f' = b_q e_j it is Σ_xx' k b_p b'_q [δ_ij/ℓ² - z_i z_j/ℓ⁴].
        """
        y, b, kernel = self.y, self.values, self.kernel
        i, p = (index[rows] for index in self.basis.entries)
        j, q = (index[columns] for index in self.basis.entries)
        of_rows, of_columns = b[:, p], b[:, q]
        smooth, moved = kernel @ b, (y[:, i] * of_rows).T
        used, place = q.unique(return_inverse=True)
        found = moved @ (y[:, j] * smooth[:, q]) - moved @ (kernel @ (y[:, j] * of_columns))
        found += (y[:, i] * smooth[:, p]).T @ (y[:, j] * of_columns)
        # Nearly all of the time. In float32 it takes half, with an error of H of 10⁻⁸.
        kernel, single, y, of_rows = kernel.float(), b[:, used].float(), y.float(), of_rows.float()
        for k in i.unique().tolist():
            here = i == k
            through = kernel @ (y[:, k, None] * single)
            found[here] -= of_rows[:, here].T @ (y[:, j] * through[:, place])
        found *= -(self.inverse**2)
        return found + (i[:, None] == j) * (self.inverse * b[:, p].T @ smooth[:, q])


def gaussian_kds(x: Tensor, basis: Basis, noise: float, length: float) -> GaussianKDS:
    """Return KDS for the Gaussian kernel.

    Args:
        x: samples, `[n, d]`.
        basis: of the drift.
        noise: σ.
        length: ℓ, in standard deviations.
    """
    y, b, diffusion = _standardized(x, basis, noise)
    inverse = length**-2
    kernel = (-0.5 * inverse * _squared_distances(y, torch.ones_like(diffusion))).exp() / len(y) ** 2
    trace = inverse**2 * _squared_distances(y, diffusion) - inverse * diffusion.sum()  # Σ_i D_i h_2
    # E k b_p z_i (2 D_i/ℓ⁴ - Σ_j D_j h_2/ℓ²)
    weighted = kernel * trace
    pulled = 2 * inverse**2 * diffusion[:, None] * _moments(kernel, y, b) - inverse * _moments(weighted, y, b)
    squares = diffusion.square()
    constant = 2 * inverse**2 * squares.sum() - 4 * inverse**3 * _squared_distances(y, squares)
    constant = (weighted * trace + kernel * constant).sum()
    return GaussianKDS(basis, y, b, kernel, inverse, pulled[basis.entries], constant)


def pairs_kds(x: Tensor, basis: Basis, noise: float, length: float) -> Dense:
    """Return KDS for the mean of the kernels κ_i κ_j over all pairs i < j.

    Σ_{i<j} A A' κ_i κ_j = Σ_i (A_i A'_i κ_i)(S - κ_i) + (Σ_i A_iκ_i)(Σ_i A'_iκ_i) - Σ_i (A_iκ_i)(A'_iκ_i), S = Σ_i κ_i.

    Arguments as in `gaussian_kds`; time n² d², memory n² d.
    """
    y, b, diffusion = _standardized(x, basis, noise)
    n, d = y.shape
    z = y.T[:, :, None] - y.T[:, None]
    inverse, square = length**-2, z.square()
    kappa = (-0.5 * inverse * square).exp()
    others = kappa.sum(0) - kappa
    first = -inverse * z * kappa
    second = (inverse**2 * square - inverse) * kappa * diffusion[:, None, None]
    blocks = [[torch.zeros(0)] * d for _ in range(d)]
    for i in range(d):
        own = -(inverse**2 * square[i] - inverse) * kappa[i] * others[i]
        blocks[i][i] = b.T @ own @ b
        for j in range(i):
            blocks[i][j] = -b.T @ (first[i] * first[j]) @ b
            blocks[j][i] = blocks[i][j].T
    third = (3 * inverse**2 - inverse**3 * square) * z * kappa * diffusion[:, None, None]
    trace = second.sum(0)
    pulled = torch.stack([(third[i] * others[i] + first[i] * (trace - second[i])).sum(1) @ b for i in range(d)])
    fourth = (inverse**4 * square.square() - 6 * inverse**3 * square + 3 * inverse**2) * kappa
    fourth = fourth * diffusion.square()[:, None, None]
    constant = (fourth * others).sum() + trace.square().sum() - second.square().sum()
    weight = 2 / (d * (d - 1) * n**2)
    hessian = torch.cat([torch.cat(row, 1) for row in blocks])
    found = Dense(weight * hessian, weight * pulled.flatten(), weight * constant)
    return found.restrict(basis.allowed.flatten())


def _standardized(x: Tensor, basis: Basis, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (standardized coordinates, values of the basis, D)."""
    return (x - basis.center) / basis.scale, basis(x), noise**2 / (2 * basis.scale.square())


def _squared_distances(y: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i weights_i (y_i - y'_i)², `[n, n]`."""
    scaled = y * weights.sqrt()
    norms = scaled.square().sum(1)
    return (norms[:, None] + norms - 2 * scaled @ scaled.T).clamp_min(0)


def _moments(kernel: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Return Σ_xx' kernel (y_i - y'_i) b_p, `[d, P]`."""
    return y.T @ (kernel.sum(1)[:, None] * b) - (kernel @ y).T @ b
