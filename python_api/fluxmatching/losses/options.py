"""Options shared by every loss of the Flux Matching family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from fluxkernels.backend import check_backend
from fluxkernels.checks import as_number_tensor, can_check_values, check_choice, check_num_steps
from fluxmatching.losses.horizons import Horizon
from fluxmatching.losses.second_derivatives import METHODS

ESTIMATORS = ("cross_chain", "single_chain")
DIVERGENCES = ("hutchinson", "exact")


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """Options of `flux_matching_loss` and its relatives. Construction checks them.

    Main:
        horizon: distribution of τ; default `TruncatedExponentialHorizon(1.0)`, which gives every τ the same weight
            e^{-τ}/q(τ). The paper's are `UniformHorizon()` and `LearnedHorizon()`.
        estimator: "cross_chain" averages over all chains of the minibatch (Eq. 9). "single_chain" uses each sample's
            own chain, differentiated pathwise (Sec. D.2).
        second_derivatives: how the field's second derivatives at x_τ are computed; see
            `fluxmatching.losses.second_derivatives`. "double_backward" and "forward_over_reverse" are exact.
            "finite_difference" needs no double backward, and 0.3 to 1 of its time; it calls the field with two rows
            per sample, so a label per sample must be part of z. "closed_form" calls the field's own method; the field
            is then a `ClosedForm`. Default: "finite_difference", but
            "double_backward" for float64 data or an exact divergence.
        divergence: "hutchinson" (one probe ε of random signs) or "exact" (one pass per coordinate; in a grouped loss
            per coordinate of a group, which requires that the field does not mix groups).
        endpoint_fraction: fraction in (0, 1] of the chains whose endpoint is differentiated, drawn anew per call. The
            other endpoints count as zero and the sum is rescaled: the gradient stays unbiased but is noisier.

    Other:
        strata: number of equal parts of the minibatch, each with its own τ and, in a noise-annealed loss, its own σ,
            drawn from as many equally probable intervals; must divide the number of samples. More lower the variance
            of the gradient at the same cost; the reference points stay those of the whole minibatch. The field then
            receives one σ per sample, `[n]`. Default: as many as sigma has, or 1, as in the paper; but up to 16 in
            `NoiseAnnealedFluxMatching` for a field with `accepts_sigma_per_sample`, such as `EDMField`.
        grouped: one independent kernel density estimate per index of the second dimension of x (one per gene).
        chunk_size: samples whose endpoints are differentiated at once, which bounds memory; None for all. A finite
            difference takes two rows per sample.
        num_steps: Langevin updates per chain; default: the length of `draws.chain`, or the paper's 4.
        gather_across_ranks: join the equal-sized minibatches of all processes of torch.distributed: one density
            estimate and one average over chains, while each process runs the network on its own share. The result is
            that of the process's own samples. `draws` then belong to the joint minibatch; sigma, refs and seed must be
            the same in every process.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Raises:
        ValueError, TypeError: a value out of its range; the message names it.
    """

    horizon: Horizon | None = None
    estimator: str = "cross_chain"
    second_derivatives: str | None = None
    divergence: str = "hutchinson"
    endpoint_fraction: float = 1.0
    strata: int | None = None
    grouped: bool = False
    chunk_size: int | None = None
    num_steps: int | None = None
    gather_across_ranks: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        name = "FluxOptions"
        if self.horizon is not None and not isinstance(self.horizon, Horizon):
            raise TypeError(f"{name}: horizon must be a Horizon, got {self.horizon!r}")
        check_choice(name, "estimator", self.estimator, ESTIMATORS)
        if self.second_derivatives is not None:
            check_choice(name, "second_derivatives", self.second_derivatives, METHODS)
        check_choice(name, "divergence", self.divergence, DIVERGENCES)
        fraction = self.endpoint_fraction
        if not isinstance(fraction, Real) or isinstance(fraction, bool) or not 0 < fraction <= 1:
            raise ValueError(f"{name}: endpoint_fraction must lie in (0, 1], got {fraction!r}")
        for flag in ("grouped", "gather_across_ranks"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{name}: {flag} must be True or False, got {getattr(self, flag)!r}")
        size = self.chunk_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name}: chunk_size must be None or a positive number of samples, got {size!r}")
        if self.num_steps is not None:
            check_num_steps(name, self.num_steps)
        if self.strata is not None:
            check_num_steps(name, self.strata, "strata")
        if self.grouped and self.strata not in (None, 1):
            raise ValueError(
                f"{name}: strata must be 1 in a grouped loss, which draws one tau per group, got {self.strata}"
            )
        if self.backend is not None:
            check_backend(self.backend, f"{name}: backend")

    def method_for(self, dtype: torch.dtype) -> str:
        """Return the method for second derivatives of a field on data of this dtype."""
        if self.second_derivatives is not None:
            return self.second_derivatives
        return "double_backward" if dtype == torch.float64 or self.divergence == "exact" else "finite_difference"

    def with_strata(self, default: int) -> FluxOptions:
        """Return the options with a number of strata: their own, or this one."""
        return replace(self, strata=default) if self.strata is None else self

    def num_endpoints(self, samples: int) -> int | None:
        """Return how many of the samples' endpoints are differentiated; None for all."""
        return max(1, round(self.endpoint_fraction * samples)) if self.endpoint_fraction < 1 else None


def check_options(function: str, options: object, kind: type) -> None:
    """Raise TypeError unless `options` is an instance of `kind`; a number there is probably a misplaced sigma."""
    if not isinstance(options, kind):
        raise TypeError(f"{function}: options must be {kind.__name__}, got {options!r}")


def check_not_half(function: str, name: str, x: Tensor) -> None:
    """Raise TypeError for data in half precision."""
    if x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{function}: {name} must be float32 or float64, got {x.dtype}; for a network in half precision keep the "
            f"data in float32 and use torch.autocast"
        )


def as_sigma(function: str, sigma: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Convert σ > 0 to a tensor of at least float32 and return (σ, σ²), both without a gradient.

    Raises:
        ValueError, TypeError: σ is not positive and finite, or its square is not, in that dtype.
    """
    level = as_number_tensor(function, "sigma", sigma, like=like).detach()
    if isinstance(sigma, Tensor):
        variance = level.square()
    else:
        # Squared before it is rounded, so that the square of math.sqrt(0.1) is 0.1 in float32 too.
        variance = torch.full_like(level, float(sigma) * float(sigma))
        level = variance.sqrt()
    if can_check_values(variance):
        tiny = torch.finfo(variance.dtype).tiny
        if not ((variance >= tiny) & variance.isfinite()).all():
            got = sigma.tolist() if isinstance(sigma, Tensor) else sigma
            raise ValueError(f"{function}: sigma must have a square within the range of {variance.dtype}, got {got}")
    return level, variance
