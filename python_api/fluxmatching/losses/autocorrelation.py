"""The memory of Langevin chains, from samples alone: an objective that rewards mixing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkernels.checks import can_check_values, check_positive
from fluxkernels.devices import no_autocast
from fluxmatching.fields import Field
from fluxmatching.losses.dual import (
    Gradients,
    LinearFeatures,
    ValuedFeatures,
    as_families,
    as_points,
    concatenate,
    field_values,
)


def autocorrelation_loss(
    field: Field,
    x: Tensor,
    features: ValuedFeatures | Sequence[ValuedFeatures] = (),
    *,
    ridge: float = 0.01,
) -> Tensor:
    """Estimate the integrated autocorrelation time of the diffusion with drift f, relative to that of the score.

    For dX = f dt + √2 dW in its stationary state p, the time of a function g is ∫_0^∞ E[g(X_0) g(X_t)] dt / E[g²]. It
    follows from L h = f·∇h + Δh, the generator: it is E[g (-L)⁻¹g]/E[g²]. Here g runs over the coordinates, whitened,
    and -L is replaced by its matrix over test functions φ (a Galerkin estimate), which are the coordinates and
    `features`, all centered on the minibatch:

        C = E φφᵀ,   S = E ∇φ·∇φ + ridge,   A_ij = E φ_i (f·∇φ_j + Δφ_j),   N = (A - Aᵀ)/2,
        time = tr[C_xx⁻¹ C_xφ (S - N)⁻¹ C_φx],   loss = time / (time with N = 0).

    For a field that keeps p, -A = S - N. N = 0 for the score, whose loss is 1 up to sampling noise. Any N makes the
    time shorter, by at most a factor 1 + |S^-½ N S^-½|². One evaluation of the field per sample, no derivative and no
    score is needed. Only the part N of A is used: the loss does not show whether f keeps p, nor whether a step of some
    size is stable. Therefore it belongs beside `augmentation_loss` or `flux_matching_loss`, and `step_defect_loss`:
    without that the loss falls as N grows, without bound on f.

    >>> features = CosineFeatures.draw(x, 32)  # doctest: +SKIP
    >>> loss = augmentation_loss(v, x, sigma).mean() + 0.1 * autocorrelation_loss(f, noised, features).mean()

    Args:
        field: f(x), x `[n, *event]`; at a noise level σ it is `lambda z: f(z, sigma)`.
        x: samples of p, `[N, *event]`, N ≥ 2, many more than test functions; at a noise level σ samples of p_σ.
        features: test functions beside the coordinates, such as `CosineFeatures.draw(x, 32)`, or several families. With
            none the estimate is exact for linear fields and normal p alone.
        ridge: added to S, which is scaled to a unit diagonal; > 0.

    Returns:
        `[N]`, the same number for every sample, in (0, 1] up to rounding. Differentiable in the parameters of the
        field; x and the features are constants. It is even in N, so that its gradient is 0 where N = 0, as for
        f = s and many samples.

    Raises:
        ValueError: too few samples, values that are not finite, no coordinate of x varies, or a ridge that is too small
            for S.
        TypeError: an argument of the wrong type.

    Source: Galerkin estimates of asymptotic variances, such as Duncan, Lelièvre and Pavliotis (2016); the paper
    rewards mixing by the proxy of Eq. 44 instead.
    """
    function = "autocorrelation_loss"
    points, ridge = as_points(function, field, x, 2), check_positive(function, "ridge", ridge)
    families = [LinearFeatures(), *as_families(function, features, with_values=True)]
    values = field_values(function, field, x)
    N, D = points.shape
    with no_autocast(x.device):
        with torch.no_grad():
            phi = torch.cat([family.values(points, points) for family in families], 1)
            phi = phi - phi.mean(0)
            found = concatenate([family.gradients(points, points) for family in families])
            energy = found.gram()
            # Functions that are constant on the data count for nothing, even if the field would change them.
            scale = _inverse_root(energy.diagonal()) * (phi.abs().amax(0) > 0)
            phi, energy = scale * phi, scale[:, None] * energy * scale
            energy = energy + ridge * torch.eye(len(energy), dtype=x.dtype, device=x.device)
            covariance = phi.T @ phi / N
            spread = _inverse_root(covariance.diagonal()[:D])
            if can_check_values(spread) and not spread.any():
                raise ValueError(f"{function}: no coordinate of x varies")
            whitened = spread[:, None] * covariance[:D]
            target = whitened.T @ torch.linalg.pinv(whitened[:, :D] * spread, hermitian=True) @ whitened
            reversible = _trace_of_solution(function, energy, target, ridge)
        turning = _antisymmetric_part(phi, scale, found, values)
        loss = torch.linalg.solve(energy - turning, target).diagonal().sum() / reversible
    return loss.expand(N)


def _inverse_root(values: Tensor) -> Tensor:
    """Return 1/√value, 0 where it is 0."""
    return torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)


def _antisymmetric_part(phi: Tensor, scale: Tensor, found: Gradients, values: Tensor) -> Tensor:
    """Return N of the scaled and centered functions φ `[N, K]`, for the values of the field `[N, D]`."""
    generated = scale * found.along(values).add(found.laplacians)
    product = phi.T @ generated / len(phi)
    return (product - product.T) / 2


def _trace_of_solution(function: str, energy: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return tr[S⁻¹ target]."""
    factor, failed = torch.linalg.cholesky_ex(energy)
    if can_check_values(failed) and failed:
        raise ValueError(f"{function}: ridge {ridge} is too small for the rounding of S; give a larger one")
    return torch.cholesky_solve(target, factor).diagonal().sum()
