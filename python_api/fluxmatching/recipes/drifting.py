"""Field of drifting models (Deng, Li, Li, Du and He 2026, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxkernels import kernel_average
from fluxkernels.checks import check_points, check_positive


def drifting_field(
    x: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    bandwidths: Sequence[float] = (0.05,),
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the field that draws generated samples to data and drives them apart.

    With logits -|x_i - y_j|/b over positives and negatives together, A_ij is the geometric mean of their softmax over j
    and over i. The field is Σ_j A⁺_ij S⁻_i y⁺_j - Σ_j A⁻_ij S⁺_i y⁻_j, S the row sums of A. It is summed over b.

    A needs no matrix: it is exp(logit_ij - L_i/2 - C_j/2), with log-sums L_i over the points and C_j over the samples,
    that is a kernel in which a point has the weight exp(-C_j/2).

    Args:
        x: generated samples or their features, `[..., N, D]`.
        positives: data, `[..., P, D]`.
        negatives: `[..., Q, D]`; None for x itself, where no sample drives itself away.
        bandwidths: b > 0, in units of x.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`, in units of x. Differentiable, which the method does not use: it takes x + field as a constant.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
    """
    function = "drifting_field"
    exclude_self = negatives is None
    points = {"x": x, "positives": positives, "negatives": x if negatives is None else negatives}
    for name, t in points.items():
        check_points(function, name, t, like=None if name == "x" else x)
    if exclude_self and x.shape[-2] == 1:
        raise ValueError(f"{function}: x must have more than one sample where negatives are not given")
    if not isinstance(bandwidths, Sequence) or not bandwidths:
        raise ValueError(f"{function}: bandwidths must be a sequence of one or more numbers, got {bandwidths!r}")
    # A common translation changes nothing; near the origin differences of averages keep their digits.
    origin = positives.mean(-2, keepdim=True)
    x, positives, other = (t - origin for t in points.values())
    total = torch.zeros_like(x)
    for bandwidth in bandwidths:
        sigma2 = check_positive(function, "bandwidths", bandwidth) ** 2
        near, to_data, in_near = _side(x, positives, sigma2, False, backend)
        far, to_others, in_far = _side(x, x if exclude_self else other, sigma2, exclude_self, backend)
        sums = in_near + in_far - torch.logaddexp(near, far)
        total = total + sums.exp().unsqueeze(-1) * (to_data - to_others)
    return total


def _side(
    x: Tensor, points: Tensor, sigma2: float, exclude_self: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum over the points `[..., N]`, their average under A `[..., N, D]`, its log-sum without L `[..., N]`)."""
    options: dict[str, Any] = {"exclude_self": exclude_self, "kernel": "laplace", "backend": backend}
    # Of these sums the logarithm alone is wanted: one column is averaged instead of all.
    _, rows = kernel_average(x, points, sigma2, points[..., :1], **options)
    _, columns = (x, rows) if exclude_self else kernel_average(points, x, sigma2, x[..., :1], **options)
    return rows, *kernel_average(x, points, sigma2, log_weights=-columns / 2, **options)
