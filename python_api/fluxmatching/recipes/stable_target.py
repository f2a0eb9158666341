"""Stable target field (Xu, Tong and Jaakkola 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkernels import kernel_average
from fluxkernels.checks import as_number_tensor, check_points
from fluxmatching.flows.closed_form import check_refs


def stable_target_field(
    z: Tensor, sigma: float | Tensor, refs: Tensor, *, log_weights: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Compute a target for denoisers with little variance: the mean of a reference batch given a noisy sample.

    m(z) = Σ_j w_j r_j with w_j = softmax_j(b_j - |z - r_j|²/2σ²). The target of a score is (m - z)/σ². It has no bias
    of its own only if the clean samples of z are among the reference points.

    Args:
        z: noisy samples, `[N, *event]`.
        sigma: noise level, one number or one per sample, `[N]`, in units of z.
        refs: reference batch, clean samples, `[M, *event]`.
        log_weights: b, `[M]`; -inf for a point that is absent.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[N, *event]`, in units of z, without derivatives.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
    """
    function = "stable_target_field"
    check_points(function, "z", z)
    check_refs(function, refs, z, "z")
    variance = as_number_tensor(function, "sigma", sigma, like=z).square()
    with torch.no_grad():
        mean, _ = kernel_average(z.flatten(1), refs.flatten(1), variance, log_weights=log_weights, backend=backend)
    return mean.reshape(z.shape)
