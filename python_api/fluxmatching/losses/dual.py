"""The dual of the flux loss: no score, no density estimate, no chain and no derivative of the field.

With L_f φ = f·∇φ + Δφ, integration by parts gives E_p[L_f φ] = E_p[(f - s)·∇φ] for every test function φ. The part of
f - s that changes p is the gradient which these numbers determine, and its mean square is

    J(f) = sup_φ { 2 E_p[L_f φ] - E_p|∇φ|² },

zero if and only if the diffusion with drift f leaves p in place. Over a family φ = Σ_k c_k φ_k the supremum is closed:
J = gᵀ G⁻¹ g with g_k = E[L_f φ_k] and G_kl = E[∇φ_k·∇φ_l].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fluxkernels.checks import check_finite, check_positive, check_tensor, shape_of
from fluxmatching.fields import Field, call_field
from fluxmatching.losses.options import check_not_half


class Gradients(NamedTuple):
    """Gradients of K test functions as sums of terms, ∇φ_k(x) = Σ_{r: owner_r = k} a_r(x) w_r, and their Laplacians.

    Attributes:
        amplitudes: a, `[N, R]`.
        directions: w, `[R, D]`.
        owners: k of each term, int64 `[R]`.
        laplacians: Δφ, `[N, K]`.
    """

    amplitudes: Tensor
    directions: Tensor
    owners: Tensor
    laplacians: Tensor


class Features(Protocol):
    """A family of test functions."""

    def gradients(self, x: Tensor) -> Gradients:
        """Return gradients and Laplacians at points `[N, D]`."""


class LinearFeatures:
    """The D coordinates: they see the mean of the field."""

    def gradients(self, x: Tensor) -> Gradients:
        N, D = x.shape
        owners = torch.arange(D, device=x.device)
        return Gradients(x.new_ones(N, D), torch.eye(D, dtype=x.dtype, device=x.device), owners, x.new_zeros(N, D))


class QuadraticFeatures:
    """The D (D + 1)/2 products of two coordinates about the mean of x: they see covariances.

    For these and the linear ones alone `quadratic_flux_loss` is quicker in many dimensions.
    """

    def gradients(self, x: Tensor) -> Gradients:
        D = x.shape[1]
        x = x - x.mean(0)
        i, j = torch.triu_indices(D, D, device=x.device)
        eye = torch.eye(D, dtype=x.dtype, device=x.device)
        owners = torch.arange(len(i), device=x.device)
        laplacians = 2.0 * (i == j).to(x.dtype)
        return Gradients(
            torch.cat([x[:, j], x[:, i]], 1),
            torch.cat([eye[i], eye[j]]),
            torch.cat([owners, owners]),
            laplacians.expand(len(x), -1),
        )


class CosineFeatures:
    """Functions cos(w_k·x + b_k).

    Args:
        frequencies: w, `[K, D]`, in inverse units of x.
        phases: b, `[K]`.
    """

    def __init__(self, frequencies: Tensor, phases: Tensor) -> None:
        name = "CosineFeatures"
        check_tensor(name, "frequencies", frequencies)
        check_tensor(name, "phases", phases, like=frequencies)
        if frequencies.ndim != 2 or phases.shape != frequencies.shape[:1]:
            raise ValueError(
                f"{name}: frequencies and phases must have shapes [K, D] and [K], got {shape_of(frequencies)} and "
                f"{shape_of(phases)}"
            )
        check_finite(name, frequencies=frequencies, phases=phases)
        self.frequencies, self.phases = frequencies, phases

    @classmethod
    def draw(
        cls, x: Tensor, count: int, *, variables: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> CosineFeatures:
        """Draw frequencies that suit data: normal, in inverse standard deviations of the coordinates of x.

        Args:
            x: data, `[N, D]`.
            count: number of functions.
            variables: coordinates on which each function depends, chosen at random; None for all.
            scale: standard deviation of the frequencies.
            seed: of the draws.
        """
        D = x.shape[1]
        generator = torch.Generator().manual_seed(seed)
        frequencies = scale * torch.randn(count, D, generator=generator, dtype=torch.float64)
        if variables is not None:
            order = torch.rand(count, D, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
            frequencies = frequencies * (order < variables)
        phases = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        return cls(frequencies.to(x) / x.std(0).clamp_min(torch.finfo(x.dtype).tiny), phases.to(x))

    def gradients(self, x: Tensor) -> Gradients:
        frequencies, phases = self.frequencies.to(x), self.phases.to(x)
        if frequencies.shape[1] != x.shape[1]:
            raise ValueError(f"CosineFeatures: frequencies have {frequencies.shape[1]} dimensions, points {x.shape[1]}")
        angles = x @ frequencies.T + phases
        owners = torch.arange(len(frequencies), device=x.device)
        laplacians = -angles.cos() * frequencies.square().sum(1)
        return Gradients(-angles.sin(), frequencies, owners, laplacians)


def dual_flux_loss(
    field: Field, x: Tensor, features: Features | Sequence[Features], *, ridge: float = 0.01, halves: bool = True
) -> Tensor:
    """Compute the dual flux loss of a field for data themselves, without noise, one number per sample.

    With L_nk = f(x_n)·∇φ_k(x_n) + Δφ_k(x_n) and G = mean of ∇φ_k·∇φ_l, scaled to a unit diagonal, the mean loss is

        J = gᵀ (G + ridge I)⁻¹ g',   g and g' the means of L over the first and the second half of x.

    The noise of the two halves is independent, so for given G the expectation is that of infinitely many samples. The
    loss is linear in the sampling of x and needs one evaluation of the field per sample, and no derivative of it. A
    family of test functions sees only what it can see: the loss of a field that is wrong elsewhere is 0 too.

    Args:
        field: f(x), x `[n, *event]`.
        x: data of one distribution, `[N, *event]`, N ≥ 4; for odd N the last sample of a half has no partner.
        features: a family of test functions, such as `LinearFeatures()`, or several.
        ridge: of the scaled G, > 0.
        halves: use two halves; else g' = g, whose mean is larger by the variance of g.

    Returns:
        `[N]`, in inverse squared units of x; single entries, and with halves the mean too, may be negative.
        Differentiable in the parameters of the field; x and the features are constants.

    Raises:
        ValueError: too few samples, or values that are not finite.
        TypeError: an argument of the wrong type.
    """
    function = "dual_flux_loss"
    points, ridge = _points(function, field, x, 4), check_positive(function, "ridge", ridge)
    families = features if isinstance(features, Sequence) else [features]
    if not families:
        raise ValueError(f"{function}: features must hold at least one family")
    with torch.no_grad():
        found = _joined([family.gradients(points) for family in families])
        gram = _gram(found)
        scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        scale = torch.where(gram.diagonal() > 0, scale, torch.zeros_like(scale))  # a constant sees nothing
        gram = scale[:, None] * gram * scale + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
    values = call_field(field, x).flatten(1)
    along = found.amplitudes * (values @ found.directions.T)
    laplacians = found.laplacians
    generated = scale * torch.zeros_like(laplacians).index_add(1, found.owners, along).add(laplacians)
    parts = generated.chunk(2) if halves else (generated, generated)
    first, second = (torch.cholesky_solve(part.mean(0)[:, None], factor)[:, 0] for part in parts)
    if not halves:
        return generated @ first
    # Each sample with the other half's solution; weights make the mean that of both halves equally.
    total = len(x) / 2
    return torch.cat([parts[0] @ second * (total / len(parts[0])), parts[1] @ first * (total / len(parts[1]))])


def quadratic_flux_loss(field: Field, x: Tensor) -> Tensor:
    """Compute the dual flux loss over all linear and quadratic test functions in closed form, one number.

    With v the mean of f, C = E[f (x - μ)ᵀ], M = C + Cᵀ + 2I, and the covariance Σ = U diag(λ) Uᵀ,

        J = |v|² + ½ Σ_ij (Uᵀ M U)²_ij / (λ_i + λ_j).

    For a linear field and normal data it is the whole flux loss. It costs D³, where `dual_flux_loss` with the same
    functions costs D⁶.

    Args:
        field: f(x), x `[n, *event]`.
        x: data, `[N, *event]`, N ≥ 2.

    Returns:
        `[]`, in inverse squared units of x; its mean over samples is larger by the variance of v and C. Differentiable
        in the parameters of the field.

    Raises:
        ValueError: too few samples, all in one place, or values that are not finite.
    """
    function = "quadratic_flux_loss"
    points = _points(function, field, x, 2)
    values = call_field(field, x).flatten(1)
    with torch.no_grad():
        centered = points - points.mean(0)
        eigenvalues, vectors = torch.linalg.eigh(centered.T @ centered / len(points))
        eigenvalues = eigenvalues.clamp_min(eigenvalues[-1] * len(eigenvalues) * torch.finfo(x.dtype).eps)
        if not eigenvalues[-1] > 0:
            raise ValueError(f"{function}: all samples of x coincide")
    mixed = (values @ vectors).T @ (centered @ vectors) / len(points)
    moved = mixed + mixed.T + 2 * torch.eye(len(mixed), dtype=x.dtype, device=x.device)
    return values.mean(0).square().sum() + 0.5 * (moved.square() / (eigenvalues[:, None] + eigenvalues)).sum()


def _points(function: str, field: Field, x: Tensor, least: int) -> Tensor:
    """Return the samples as `[N, D]`, checked."""
    if not callable(field):
        raise TypeError(f"{function}: field must be callable, got {type(field).__name__}")
    check_tensor(function, "x", x)
    check_not_half(function, "x", x)
    if x.ndim < 2 or len(x) < least:
        raise ValueError(f"{function}: x must have shape [N, *event] with N at least {least}, got {shape_of(x)}")
    check_finite(function, x=x)
    return x.detach().flatten(1)


def _joined(found: list[Gradients]) -> Gradients:
    """Return the gradients of several families as those of one."""
    owners, first = [], 0
    for family in found:
        owners.append(family.owners + first)
        first += family.laplacians.shape[1]
    return Gradients(
        torch.cat([family.amplitudes for family in found], 1),
        torch.cat([family.directions for family in found]),
        torch.cat(owners),
        torch.cat([family.laplacians for family in found], 1),
    )


def _gram(found: Gradients) -> Tensor:
    """Return the mean of ∇φ_k·∇φ_l over the samples, `[K, K]`."""
    amplitudes, directions, owners, laplacians = found
    terms = (amplitudes.T @ amplitudes / len(amplitudes)) * (directions @ directions.T)
    K = laplacians.shape[1]
    rows = terms.new_zeros(K, terms.shape[1]).index_add(0, owners, terms)
    return rows.new_zeros(K, K).index_add(1, owners, rows)
