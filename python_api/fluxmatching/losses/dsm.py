"""Denoising score matching with stable targets, the baseline of Flux Matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxkernels import kde_mean, philox
from fluxkernels.backend import check_backend
from fluxkernels.checks import check_choice, check_finite, check_same_shape, check_seed, check_tensor
from fluxmatching.fields import Field, finite_field, per_sample
from fluxmatching.losses.draws import Draws, seeded_start
from fluxmatching.losses.grouping import Grouping
from fluxmatching.losses.options import as_sigma, check_options

FORMS = ("x0", "eps")


@dataclass(frozen=True, kw_only=True)
class DSMOptions:
    """Options of `dsm_loss`. Construction checks them.

    Attributes:
        form: weight of |f - s|²: "x0" makes it |D - m|² of the denoiser D = z + σ² f, "eps" |ε - (z - m)/σ|² of the
            noise prediction ε = -σ f.
        stable: regress on the mean of the kernel density estimate (Xu, Tong and Jaakkola 2023); False takes the
            single-sample target.
        backend: "torch", "cpu", "triton", or None for the automatic choice.
    """

    form: str = "eps"
    stable: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        check_choice("DSMOptions", "form", self.form, FORMS)
        if not isinstance(self.stable, bool):
            raise TypeError(f"DSMOptions: stable must be True or False, got {self.stable!r}")
        if self.backend is not None:
            check_backend(self.backend, "DSMOptions: backend")


def dsm_loss(
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: DSMOptions = DSMOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute the denoising score matching loss, one number per sample, with stable targets by default.

    At z = x + σ n0 the target is s = (m(z) - z)/σ², with m the `kde_mean` over refs (stable) or x itself. The forms
    weight |f - s|²: "x0" by σ⁴, |(z + σ² f) - m|²; "eps" by σ², |σ f + (z - m)/σ|².

    Args:
        field: maps `[N, *event]` to the same shape.
        x: clean minibatch, `[N, *event]`.
        sigma: σ > 0 in units of x: one value, or one per sample, `[N]`.
        options: see `DSMOptions`.
        refs: reference points of the stable target, `[M, *event]`; default x.
        draws: fixes n0, its `start`, shape of x; its other parts are not used.
        seed: makes n0 by Philox, equal to that of `flux_matching_loss`. None uses torch's generator.

    Returns:
        `[N]`, summed over the event.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the requested backend cannot run here.
    """
    function = "dsm_loss"
    check_options(function, options, DSMOptions)
    check_tensor(function, "x", x)
    check_finite(function, x=x)
    grouping = Grouping(function, x, grouped=False)
    points = grouping.refs_to_points(x if refs is None else check_tensor(function, "refs", refs, like=x))
    check_finite(function, refs=refs)
    level, variance = as_sigma(function, sigma, like=x)
    if level.ndim > 1 or (level.ndim == 1 and level.shape != x.shape[:1]):
        raise ValueError(f"{function}: sigma must be one number or one per sample, got shape {list(level.shape)}")
    start = _start(function, x, draws, seed)
    scale, weight = per_sample(level, x), per_sample(variance, x)
    z = (x + scale * start).to(x.dtype).detach()
    mean = x
    if options.stable:
        with torch.no_grad():
            mean = grouping.from_points(kde_mean(grouping.to_points(z), points, variance, backend=options.backend))
    error = (z - mean) + weight * finite_field(function, field, z)
    return (error.square() / (weight if options.form == "eps" else torch.ones_like(weight))).flatten(1).sum(1)


def _start(function: str, x: Tensor, draws: Draws | None, seed: int | Tensor | None) -> Tensor:
    """Return n0: the one of the draws, of the seed, or of torch's generator."""
    check_seed(function, seed)
    if draws is not None and not isinstance(draws, Draws):
        raise TypeError(f"{function}: draws must be a Draws, got {draws!r}")
    if draws is not None and draws.start is not None:
        if seed is not None:
            raise ValueError(f"{function}: give draws.start or seed, not both")
        start = check_same_shape(function, "draws.start", draws.start, "x", x)
        check_finite(function, **{"draws.start": start})
        return start
    if seed is None:
        return torch.randn_like(x)
    return seeded_start(x, philox.as_seed(seed, x.device))
