"""Modes of a kernel density estimate (Fukunaga and Hostetler 1975; Comaniciu and Meer 2002)."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkernels import kde_mean
from fluxkernels.checks import check_num_steps, check_points, check_positive


def mean_shift(
    x: Tensor,
    refs: Tensor,
    sigma: float,
    *,
    log_weights: Tensor | None = None,
    max_steps: int = 500,
    tolerance: float = 1e-4,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Move points uphill on the density, x ← m(x), until none moves further than `tolerance` σ.

    Whether to go on is read from the device, so it does not compile into one graph.

    Args:
        x: where to start, `[..., N, D]`.
        refs: `[..., M, D]`.
        sigma: bandwidth σ, in units of x.
        log_weights: `[..., M]` or `[M]`, log of the weight of each reference point.
        max_steps: largest number of steps.
        tolerance: length of a last step, in units of σ. What is left of the way to a mode is several times that.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        (points `[..., N, D]`, whether each has arrived `[..., N]`).
    """
    variance = check_positive("mean_shift", "sigma", sigma) ** 2
    limit = sigma * check_positive("mean_shift", "tolerance", tolerance)
    check_points("mean_shift", "x", x)
    check_points("mean_shift", "refs", refs, like=x)
    # Near the origin, coordinates have digits for the last steps.
    origin = refs.mean(-2, keepdim=True)
    x, refs = x - origin, refs - origin
    arrived = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    with torch.no_grad():
        for _ in range(check_num_steps("mean_shift", max_steps, "max_steps")):
            mean = kde_mean(x, refs, variance, log_weights=log_weights, backend=backend)
            arrived = (mean - x).norm(dim=-1) <= limit
            x = mean
            if arrived.all():
                break
    return x + origin, arrived
