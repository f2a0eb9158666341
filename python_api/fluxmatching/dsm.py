"""Denoising score matching with stable targets, the baseline of Flux Matching."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkernels import kde_mean, philox
from fluxkernels.checks import as_number_tensor, check_finite, check_same_shape, check_seed, check_tensor, one_of
from fluxmatching.endpoint import Field, call_field
from fluxmatching.layout import Layout

FORMS = ("x0", "eps")


def dsm_loss(
    field: Field,
    x: Tensor,
    sigma2: float | Tensor,
    *,
    refs: Tensor | None = None,
    form: str = "eps",
    stable: bool = True,
    start: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Denoising score matching, with the stable targets of Xu, Tong and Jaakkola (2023) unless told otherwise.

    At z = x + σ n0 the target is s = (m(z) - z)/σ², m the `kde_mean` over refs (stable) or x itself. The forms weight
    |f - s|² so that they read "x0": σ⁴|f - s|² = |(z + σ² f) - m|², "eps": σ²|f - s|² = |σ f + (z - m)/σ|².

    Args:
        field: maps `[N, *event]` to the same shape.
        x: clean minibatch, `[N, *event]`.
        sigma2: σ² > 0 in squared units of x: one value, or one a sample, `[N]`.
        refs: centres of the stable target, `[M, *event]`; default x.
        form: "x0" or "eps".
        stable: False takes the single-sample target.
        start: n0, shape of x.
        seed: makes n0 by Philox, the same as in `flux_matching_loss`; with neither, torch's generator decides.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[N]`, summed over the event.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the backend named cannot run here.
    """
    function = "dsm_loss"
    check_tensor(function, "x", x)
    check_finite(function, x=x)
    check_seed(function, seed)
    one_of(function, "form", form, FORMS)
    layout = Layout(function, x, grouped=False)
    centres = layout.centres(x if refs is None else check_tensor(function, "refs", refs, like=x))
    if start is not None and seed is not None:
        raise ValueError(f"{function}: give start or seed, not both")
    variance = as_number_tensor(function, "sigma2", sigma2, like=x).detach()
    if variance.ndim > 1 or (variance.ndim == 1 and len(variance) != len(x)):
        raise ValueError(f"{function}: sigma2 must be one number or one a sample, got shape {list(variance.shape)}")
    per_sample = variance.reshape(-1, *(1 for _ in x.shape[1:]))
    if start is not None:
        check_same_shape(function, "start", start, "x", x)
        check_finite(function, start=start)
    elif seed is None:
        start = torch.randn_like(x)
    else:
        points = layout.to_points(x)
        key = philox.as_seed(seed, x.device)
        start = layout.from_points(philox.normal(key, (1, *points.shape), philox.START, variance.dtype)[0])
    z = (x + per_sample.sqrt() * start).to(x.dtype).detach()
    with torch.no_grad():
        mean = layout.from_points(kde_mean(layout.to_points(z), centres, variance, backend=backend)) if stable else x
    error = (z - mean) + per_sample * call_field(field, z)
    weight = per_sample if form == "eps" else torch.ones_like(per_sample)
    return (error.square() / weight).flatten(1).sum(1)
