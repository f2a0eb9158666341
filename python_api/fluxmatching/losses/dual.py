"""The dual of the flux loss: no score, no density estimate, no chain and no derivative of the field.

With L_f φ = f·∇φ + Δφ, integration by parts gives E_p[L_f φ] = E_p[(f - s)·∇φ] for every test function φ. The part of
f - s that changes p is the gradient which these numbers determine. Its mean square is the projected Fisher divergence,

    J(f) = sup_φ { 2 E_p[L_f φ] - E_p|∇φ|² },

zero if and only if the diffusion with drift f leaves p in place; the mean of `flux_matching_loss` with a long horizon
is (2/σ²) J. Over a family φ = Σ_k c_k φ_k the supremum has a closed form: J = gᵀ G⁻¹ g with g_k = E[L_f φ_k] and
G_kl = E[∇φ_k·∇φ_l].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fluxkernels.checks import (
    can_check_values,
    check_finite,
    check_num_steps,
    check_positive,
    check_tensor,
    shape_of,
)
from fluxkernels.devices import no_autocast
from fluxmatching.fields import Field, finite_field
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

    def along(self, values: Tensor) -> Tensor:
        """Return f·∇φ, `[N, K]`, for values f of a field, `[N, D]`."""
        terms = self.amplitudes * (values @ self.directions.T)
        return torch.zeros_like(self.laplacians).index_add(1, self.owners, terms)

    def gram(self) -> Tensor:
        """Return the mean of ∇φ·∇φ over the points, `[K, K]`."""
        terms = (self.amplitudes.T @ self.amplitudes / len(self.amplitudes)) * (self.directions @ self.directions.T)
        K = self.laplacians.shape[1]
        gram = terms.new_zeros(K, len(self.owners)).index_add(0, self.owners, terms)
        return gram.new_zeros(K, K).index_add(1, self.owners, gram)


@runtime_checkable
class Features(Protocol):
    """A family of test functions."""

    def gradients(self, x: Tensor, refs: Tensor) -> Gradients:
        """Return gradients and Laplacians at points x `[N, D]`; refs `[M, D]` are the data that set a center."""


@runtime_checkable
class ValuedFeatures(Features, Protocol):
    """A family of test functions that also has their values, which `autocorrelation_loss` needs."""

    def values(self, x: Tensor, refs: Tensor) -> Tensor:
        """Return φ_k(x) up to constants, `[N, K]`; arguments as in `gradients`."""


F = TypeVar("F", bound=Features)


class LinearFeatures:
    """The D coordinates: their part of the loss is the squared mean of the field."""

    def values(self, x: Tensor, refs: Tensor) -> Tensor:
        return centered(x, refs)

    def gradients(self, x: Tensor, refs: Tensor) -> Gradients:
        N, D = x.shape
        owners = torch.arange(D, device=x.device)
        return Gradients(x.new_ones(N, D), torch.eye(D, dtype=x.dtype, device=x.device), owners, x.new_zeros(N, D))


class QuadraticFeatures:
    """The D (D + 1)/2 products of two coordinates about their means, which show whether covariances change.

    For these and the linear ones alone `quadratic_flux_loss` is quicker in many dimensions.
    """

    def values(self, x: Tensor, refs: Tensor) -> Tensor:
        x = centered(x, refs)
        i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
        return x[:, i] * x[:, j]

    def gradients(self, x: Tensor, refs: Tensor) -> Gradients:
        D = x.shape[1]
        x = centered(x, refs)
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
    """Functions cos(w_k·(x - c) + b_k).

    Args:
        frequencies: w, `[K, D]`, in inverse units of x.
        phases: b, `[K]`.
        center: c, `[D]`; None for the origin. Far from it float32 has few digits for the angle.
    """

    def __init__(self, frequencies: Tensor, phases: Tensor, center: Tensor | None = None) -> None:
        name = "CosineFeatures"
        check_tensor(name, "frequencies", frequencies)
        check_tensor(name, "phases", phases, like=frequencies)
        if frequencies.ndim != 2 or phases.shape != frequencies.shape[:1]:
            raise ValueError(
                f"{name}: frequencies and phases must have shapes [K, D] and [K], got {shape_of(frequencies)} and "
                f"{shape_of(phases)}"
            )
        self.center = torch.zeros_like(frequencies[0]) if center is None else center
        check_tensor(name, "center", self.center, like=frequencies)
        if self.center.shape != frequencies.shape[1:]:
            raise ValueError(f"{name}: center must have shape {shape_of(frequencies[0])}, got {shape_of(self.center)}")
        check_finite(name, frequencies=frequencies, phases=phases, center=self.center)
        self.frequencies, self.phases = frequencies, phases

    @classmethod
    def draw(
        cls, x: Tensor, num_features: int, *, num_coordinates: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> CosineFeatures:
        """Draw frequencies that suit data: normal, in inverse standard deviations of the coordinates of x.

        Args:
            x: data, `[N, *event]`, N ≥ 2. Coordinates that are constant have frequency 0.
            num_features: number of functions.
            num_coordinates: coordinates on which each function depends, chosen at random; None for all.
            scale: standard deviation of the frequencies.
            seed: of the draws.

        Raises:
            ValueError: no coordinate of x varies, or a number out of range.
        """
        name = "CosineFeatures.draw"
        check_tensor(name, "x", x)
        check_not_half(name, "x", x)
        num_features, scale = check_num_steps(name, num_features, "num_features"), check_positive(name, "scale", scale)
        if x.ndim < 2 or len(x) < 2:
            raise ValueError(f"{name}: x must have shape [N, *event] with N at least 2, got {shape_of(x)}")
        check_finite(name, x=x)
        points = x.detach().flatten(1)
        spread = spread_of(points)
        varying = (spread > 0).cpu()
        if not varying.any():
            raise ValueError(f"{name}: no coordinate of x varies")
        shape = num_features, points.shape[1]
        random = np.random.default_rng(seed)
        frequencies = scale * torch.from_numpy(random.standard_normal(shape))
        if num_coordinates is not None:
            num_coordinates = check_num_steps(name, num_coordinates, "num_coordinates")
            order = torch.where(varying, torch.from_numpy(random.random(shape)), 2.0).argsort(1).argsort(1)
            frequencies = frequencies * (order < num_coordinates)
        phases = torch.from_numpy(2 * np.pi * random.random(num_features))
        frequencies = torch.where(spread > 0, frequencies.to(points) / torch.where(spread > 0, spread, 1), 0)
        return cls(frequencies, phases.to(points), points.mean(0))

    def values(self, x: Tensor, refs: Tensor) -> Tensor:
        return self._angles(x)[0].cos()

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles `[N, K]` and the frequencies in the dtype of x."""
        frequencies, phases, center = (t.to(x) for t in (self.frequencies, self.phases, self.center))
        if frequencies.shape[1] != x.shape[1]:
            raise ValueError(f"CosineFeatures: frequencies have {frequencies.shape[1]} dimensions, points {x.shape[1]}")
        return (x - center) @ frequencies.T + phases, frequencies

    def gradients(self, x: Tensor, refs: Tensor) -> Gradients:
        angles, frequencies = self._angles(x)
        owners = torch.arange(len(frequencies), device=x.device)
        laplacians = -angles.cos() * frequencies.square().sum(1)
        return Gradients(-angles.sin(), frequencies, owners, laplacians)


def dual_flux_loss(
    field: Field,
    x: Tensor,
    features: Features | Sequence[Features],
    *,
    refs: Tensor | None = None,
    ridge: float = 0.01,
    halves: bool = True,
) -> Tensor:
    """Compute the dual flux loss of a field for data themselves, without noise, one number per sample.

    With L_nk = f(x_n)·∇φ_k(x_n) + Δφ_k(x_n) and G = mean of ∇φ_k·∇φ_l, scaled to a unit diagonal, the mean loss is

        J = gᵀ (G + ridge I)⁻¹ g',   g and g' the means of L over the first and the second half of x.

    It needs one evaluation of the field per sample, and no derivative of it. Test functions show only what they depend
    on: a field that is wrong elsewhere has loss 0 too. The noise of the two halves is independent if samples are in
    random order. Then the mean over minibatches is J for given G; G from the minibatch itself adds to it unless there
    are many more samples than test functions, which `refs` avoids.

    Args:
        field: f(x), x `[n, *event]`.
        x: data in random order, `[N, *event]`, N ≥ 4. For odd N the first half has one sample more.
        features: a family of test functions, such as `LinearFeatures()`, or several.
        refs: more data, `[M, *event]`, from which G and centers come; default x.
        ridge: of the scaled G, > 0.
        halves: use two halves; else g' = g, whose mean is larger by the variance of g.

    Returns:
        `[N]`, in inverse squared units of x; single entries, and with halves the mean too, may be negative.
        Differentiable in the parameters of the field; x and the features are constants.

    Raises:
        ValueError: too few samples, values that are not finite, or a ridge that is too small for G.
        TypeError: an argument of the wrong type.
    """
    function = "dual_flux_loss"
    points, ridge = as_points(function, field, x, 4), check_positive(function, "ridge", ridge)
    others = (
        points if refs is None else as_points(function, field, check_tensor(function, "refs", refs, like=x), 1, "refs")
    )
    if others.shape[1] != points.shape[1]:
        raise ValueError(f"{function}: refs must have the event shape of x, {shape_of(x)}, got {shape_of(others)}")
    families = as_families(function, features)
    if not families:
        raise ValueError(f"{function}: features must hold at least one family")
    if not isinstance(halves, bool):
        raise TypeError(f"{function}: halves must be True or False, got {halves!r}")
    values = field_values(function, field, x)
    with no_autocast(x.device):
        with torch.no_grad():
            found = concatenate([family.gradients(points, others) for family in families])
            of_refs = found if refs is None else concatenate([family.gradients(others, others) for family in families])
            scale, factor = _factor(function, of_refs, ridge)
        generated = scale * found.along(values).add(found.laplacians)
        if not halves:
            return generated @ torch.cholesky_solve(generated.mean(0)[:, None], factor)[:, 0]
        parts = generated.chunk(2)
        first, second = (torch.cholesky_solve(part.mean(0)[:, None], factor)[:, 0] for part in parts)
        # Each sample with the solution of the other half, so that both halves have the same weight in the mean.
        weights = [len(x) / 2 / len(part) for part in parts]
        return torch.cat([parts[0] @ second * weights[0], parts[1] @ first * weights[1]])


def quadratic_flux_loss(field: Field, x: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Compute the dual flux loss over all linear and quadratic test functions in closed form.

    With v the mean of f, C = E[f (x - μ)ᵀ], M = C + Cᵀ + 2I, and the covariance Σ = U diag(λ) Uᵀ,

        J = |v|² + ½ Σ_ij (Uᵀ M U)²_ij / (λ_i + λ_j).

    For a linear field and normal data it is the projected Fisher divergence itself. It costs D³, where `dual_flux_loss`
    with the same functions costs D⁶.

    Args:
        field: f(x), x `[n, *event]`.
        x: data, `[N, *event]`, N > D, with a covariance of full rank; without that give a ridge.
        ridge: added to the λ, in units of their mean, ≥ 0; another number than the ridge of `dual_flux_loss`.

    Returns:
        `[N]`, the same number for every sample, in inverse squared units of x. Its mean over minibatches is larger than
        J by the variance of v and C. Differentiable in the parameters of the field; x is constant.

    Raises:
        ValueError: too few samples, a singular covariance without a ridge, or values that are not finite.
        TypeError: an argument of the wrong type.
    """
    function = "quadratic_flux_loss"
    points = as_points(function, field, x, 2)
    if ridge != 0 or isinstance(ridge, bool):
        ridge = check_positive(function, "ridge", ridge)
    values = field_values(function, field, x)
    with no_autocast(x.device):
        with torch.no_grad():
            about_mean = centered(points, points)
            eigenvalues, vectors = torch.linalg.eigh(about_mean.T @ about_mean / len(points))
            eigenvalues = eigenvalues.clamp_min(0) + ridge * eigenvalues.mean()
        rounding = len(eigenvalues) * torch.finfo(x.dtype).eps * eigenvalues[-1]
        if can_check_values(eigenvalues) and not eigenvalues[0] > rounding:
            raise ValueError(
                f"{function}: the covariance of x, {shape_of(x)}, is singular; give more samples than dimensions, "
                f"leave out constant coordinates, or give a ridge such as 0.01"
            )
        mean = values.mean(0)
        mixed = ((values - mean.detach()) @ vectors).T @ (about_mean @ vectors) / len(points)
        moved = mixed + mixed.T + 2 * torch.eye(len(mixed), dtype=x.dtype, device=x.device)
        loss = mean.square().sum() + 0.5 * (moved.square() / (eigenvalues[:, None] + eigenvalues)).sum()
    return loss.expand(len(x))


def as_families(function: str, features: F | Sequence[F], *, with_values: bool = False) -> list[F]:
    """Return a family of test functions, or several, as a list."""
    families = list(features) if isinstance(features, Sequence) else [features]
    for family in families:
        if isinstance(family, type) or not isinstance(family, ValuedFeatures if with_values else Features):
            raise TypeError(f"{function}: features must be families of test functions, got {family!r}")
    return families


def as_points(function: str, field: Field, x: Tensor, least: int, name: str = "x") -> Tensor:
    """Return the samples of an argument as `[N, D]`, checked."""
    if not callable(field):
        raise TypeError(f"{function}: field must be callable, got {type(field).__name__}")
    check_tensor(function, name, x)
    check_not_half(function, name, x)
    if x.ndim < 2 or len(x) < least:
        raise ValueError(f"{function}: {name} must have shape [N, *event] with N at least {least}, got {shape_of(x)}")
    check_finite(function, **{name: x})
    return x.detach().flatten(1)


def field_values(function: str, field: Field, x: Tensor) -> Tensor:
    """Return the field at the samples, `[N, D]`, whatever it does with its input."""
    return finite_field(function, field, x.detach().clone()).flatten(1)


def spread_of(x: Tensor) -> Tensor:
    """Return the standard deviation of each coordinate, 0 where it is only rounding of a constant."""
    spread = x.std(0, unbiased=False)
    return torch.where(spread > 8 * torch.finfo(x.dtype).eps * x.abs().amax(0), spread, 0)


def centered(x: Tensor, refs: Tensor) -> Tensor:
    """Return x about the mean of the data, exactly 0 in coordinates that are constant in the data."""
    return torch.where(spread_of(refs) > 0, x - refs.mean(0), 0)


def concatenate(found: list[Gradients]) -> Gradients:
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


def _factor(function: str, found: Gradients, ridge: float) -> tuple[Tensor, Tensor]:
    """Return (the scale of each test function, the Cholesky factor of the scaled G with its ridge)."""
    gram = found.gram()
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0)  # 0: no gradient
    gram = scale[:, None] * gram * scale + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if can_check_values(failed) and failed:
        raise ValueError(f"{function}: ridge {ridge} is too small for the rounding of G; give a larger one")
    return scale, factor
