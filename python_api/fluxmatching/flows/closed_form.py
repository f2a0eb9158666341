"""Marginal velocity of a path in closed form, for data that are a set of points (Eq. 60, for every path)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkernels import kde_mean
from fluxkernels.checks import check_finite, check_points, check_tensor, shape_of
from fluxmatching.fields import per_sample
from fluxmatching.flows.paths import Coefficients, LinearPath, Path, check_path, check_times


def marginal_velocity(
    x: Tensor, t: float | Tensor, refs: Tensor, path: Path = LinearPath(), *, backend: str | None = None
) -> Tensor:
    """Compute the velocity that carries the noise of a path to the reference points (Eq. 60).

    v(x) = α' m + σ' (x - α m)/σ, with m(x) = Σ_j w_j r_j and w_j = softmax_j(-|x - α r_j|²/2σ²), the posterior mean of
    the data. At α = 0 all weights are equal. At σ = 0 m is the nearest point, and v is infinite away from it.

    Args:
        x: `[N, *event]`.
        t: times in [0, 1]: one number, or one per sample, `[N]`.
        refs: reference points r, the data, `[M, *event]`.
        path: α and σ.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[N, *event]`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the requested backend cannot run here.
    """
    function = "marginal_velocity"
    check_path(function, path)
    check_points(function, "x", x)
    check_refs(function, refs, x, "x")
    check_finite(function, x=x)
    if x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"{function}: x must be float32 or float64, got {x.dtype}")
    c = path.coefficients(check_times(function, t, x).double())
    mean = posterior_mean(x, c, refs, backend)
    c = c.reshape_for(x)
    noise = over_sigma(x - c.alpha * mean, x, c.sigma)
    return c.alpha_rate * mean + torch.where(noise == 0, noise, c.sigma_rate * noise)


def posterior_mean(x: Tensor, c: Coefficients, refs: Tensor, backend: str | None) -> Tensor:
    """Return m(x), the mean of the reference points given x, for coefficients `[]` or `[N]`; one `kde_mean`.

    The weights depend on |x/α - r|²/2(σ/α)²: so each point may have a time of its own.
    """
    # Below its precision, α and σ are their limits: equal weights, and the nearest point.
    limits = torch.finfo(x.dtype)
    alpha = c.alpha.clamp_min(limits.eps)
    sigma2 = (c.sigma / alpha).square().clamp_min(limits.tiny).to(torch.promote_types(x.dtype, torch.float32))
    points = x.flatten(1) / alpha.to(x.dtype).reshape(-1, 1)
    return kde_mean(points, refs.flatten(1), sigma2, backend=backend).reshape(x.shape)


def posterior_mean_of_class(
    x: Tensor, c: Coefficients, refs: Sequence[Tensor], labels: Tensor, backend: str | None
) -> Tensor:
    """Return the posterior mean given x and its class, over the reference points of that class."""
    # All samples with every class, of which one is used: which samples have a label is not read from the device, and
    # the cost is that of one mean over all points.
    mean = x
    for label, points in enumerate(refs):
        mean = torch.where(per_sample(labels == label, x), posterior_mean(x, c, points, backend), mean)
    return mean


def over_sigma(difference: Tensor, size: Tensor, sigma: Tensor) -> Tensor:
    """Return difference/σ; 0 at σ = 0 for a difference of numbers like `size` that is within their rounding."""
    rounding = 8 * torch.finfo(size.dtype).eps * size.abs()
    vanishes = (sigma == 0) & (difference.abs() <= rounding)
    return torch.where(vanishes, torch.zeros_like(difference), difference / sigma)


def check_refs(function: str, refs: object, x: Tensor, like: str, name: str = "refs") -> Tensor:
    """Return `refs`, the argument `name`, if it is a finite `[M, *event]` with the event of x, the argument `like`."""
    refs = check_tensor(function, name, refs, like=x)
    if refs.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"{function}: {name} must have shape [M, *event] with the event of {like}, {list(x.shape[1:])}, got "
            f"{shape_of(refs)}"
        )
    check_finite(function, **{name: refs})
    return refs
