"""v-Flux Matching: fields with the same marginal path as a flow, along other particle paths (Appendix E)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import can_check_values, check_tensor
from fluxmatching.engines import without_engine
from fluxmatching.fields import per_sample
from fluxmatching.flows.paths import LinearPath, Path, check_path, check_times
from fluxmatching.flows.times import Times, UniformTimes, check_distribution
from fluxmatching.losses.annealed import FixedScale, LossNormalizer, normalized_terms
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.modules import Logged, LossModule, draw_from, strata_for
from fluxmatching.losses.options import FluxOptions, check_options
from fluxmatching.losses.second_derivatives import ConditionedField
from fluxmatching.losses.target import FluxTarget, MatchedField, build_target


class FieldInDataUnits(ConditionedField):
    """A field v(x, t) of x_t as one of z = x_t/α = x1 + (σ/α) x0: g(z) = v(α z, t)/α.

    Residuals, and with them the loss, do not depend on this unit. In it all times share their reference points.

    Args:
        field: v(x, t), with t `[n]`.
        t: `[]` or `[N]`.
        path: α.
    """

    def __init__(self, field: Callable[..., Tensor], t: Tensor, path: Path) -> None:
        super().__init__(field, t)
        self.path = path

    def replace(self, field: Callable[..., Tensor], condition: Tensor) -> FieldInDataUnits:
        """Return the field with another function and other times."""
        return FieldInDataUnits(field, condition, self.path)

    def evaluate(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return v(α z, t)/α, the condition being t."""
        t = condition
        alpha = per_sample(self.path.coefficients(t.double()).alpha.to(z.dtype), z)
        value = self.field(alpha * z, t.to(z.dtype).expand(len(z)))
        return value / alpha if isinstance(value, Tensor) and value.shape == z.shape else value


def v_flux_loss(
    field: Callable[..., Tensor],
    x: Tensor,
    t: float | Tensor,
    path: Path = LinearPath(),
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute the v-Flux Matching loss of a field at time t (Eq. 55, Eq. 56), one number per sample.

    It is `flux_matching_loss` at the marginal p_t, with the mismatch u = f(·, t) - v_t from the marginal velocity v_t
    of the path in place of the score: v_t(x) = a x + b s_t(x), a = α'/α, b = σ² α'/α - σ σ', s_t the score of the
    kernel density estimate on α refs with variance σ². The mean loss is 0 for fields with ∇·(p_t f) = ∇·(p_t v_t),
    which carry p_t along the path as v_t does. So its mean is 2/σ² of the projected Fisher divergence of Eq. 57.

    Args:
        field: f(x, t), x_t `[n, *event]` and t `[n]`, each sample by itself.
        x: samples of the data, `[N, *event]`, float32 or float64.
        t: time with α(t) > 0 and σ(t) > 0, shared by the minibatch; or one per stratum of the options, `[strata]`. In
            float32 the target loses digits as α(t) → 0: an error of 4·10⁻⁵ at α = 10⁻³, 4·10⁻⁴ at 10⁻⁴.
        path: α and σ of x_t = α x1 + σ x0.
        options: as for the other losses of the family; see `FluxOptions`.
        refs: reference points of the kernel density estimate, data at t = 1, `[M, *event]`. Default x.
        draws, seed: as in `flux_matching_loss`; draws.start is x0.

    Returns:
        ℓ, `[N]`, summed over the event. Differentiable in the field's parameters; take its mean as the loss.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the requested backend cannot run here.
    """
    function = "v_flux_loss"
    check_options(function, options, FluxOptions)
    check_tensor(function, "x", x)
    options = options.with_strata(len(t) if isinstance(t, Tensor) and t.ndim == 1 else 1)
    times = _strata_times(function, t, x, options)
    target, inner = _v_flux_target(function, field, x, times, path, options, refs=refs, draws=draws, seed=seed)
    return target.loss(inner)


def _strata_times(function: str, t: float | Tensor, x: Tensor, options: FluxOptions) -> Tensor:
    """Return t as `[]`, or `[strata]`."""
    if isinstance(t, Tensor) and t.ndim:
        if list(t.shape) != [options.strata] or options.strata == 1:
            takes = "one number" if options.strata == 1 else f"one number or one per stratum, shape [{options.strata}]"
            raise ValueError(f"{function}: t must be {takes}, got shape {list(t.shape)}")
        return check_times(function, t, t.to(x.device))
    return check_times(function, t, x)


def _v_flux_target(
    function: str,
    field: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    path: Path,
    options: FluxOptions,
    **given: Tensor | Draws | int | None,
) -> tuple[FluxTarget, Callable[[Tensor], Tensor]]:
    """Return the target in data units, and the field at its points, which is differentiable in its parameters."""
    check_path(function, path)
    if not callable(field):
        raise TypeError(f"{function}: field must be callable, got {type(field).__name__}")
    if options.grouped:
        raise ValueError(f"{function}: grouped must be False: a flow has one marginal path")
    if options.second_derivatives == "closed_form":
        raise ValueError(f"{function}: second_derivatives='closed_form' is for fields f(z) without a time")
    c = path.coefficients(t.double())
    if can_check_values(c.alpha) and not ((c.alpha > 0) & (c.sigma > 0)).all():
        raise ValueError(f"{function}: t must have alpha > 0 and sigma > 0 on the path, got {t.tolist()}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    sigma = (c.sigma / c.alpha).to(dtype)
    matched = MatchedField(c.linear, c.score / c.alpha.square())
    inner = FieldInDataUnits(without_engine(function, field), t, path)
    target = build_target(function, inner, x, sigma, options, matched, **given)
    return target, FieldInDataUnits(field, target.per_sample(t), path)


class VFluxMatching(LossModule):
    """v-Flux Matching along the whole path (Eq. 61), `v_flux_loss` at random times, one per stratum.

    Horizon and normalizer are functions of σ(t)/α(t), and so of t. Without a normalizer the losses of all times are
    in units of the velocity: ℓ σ(t)²/2 estimates the squared error of the part of the field that moves p_t (Eq. 57).
    Its gradient is half of that error's, as that of ℓ is, so a penalty added to it counts twice. A learned normalizer
    follows the losses: times near t = 0, where the field is nearly right from the start, get nearly all the weight.

    Args:
        field: f(x, t), x `[n, *event]` and t `[n]`; a module or function.
        path: α and σ of x_t = α x1 + σ x0.
        options: see `FluxOptions`. A learned horizon becomes a submodule.
        times: distribution of t.
        normalizer: s_η of Eq. 61, such as `LossNormalizer()`; None for units of the velocity.
        refs: reference points, see `ReferenceSet`; default: the minibatch.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        path: Path = LinearPath(),
        options: FluxOptions = FluxOptions(),
        *,
        times: Times = UniformTimes(),
        normalizer: LossNormalizer | None = None,
        refs: Tensor | int | None = None,
    ) -> None:
        name = "VFluxMatching"
        check_options(name, options, FluxOptions)
        super().__init__(field, options.horizon, refs, options.gather_across_ranks)
        self.path, self.options = check_path(name, path), options
        self.times = check_distribution(name, times)
        self.normalizer = normalizer

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "flux", "tau", "t"}, flux the mean of ℓ before normalization.

        Args:
            x: samples of the data, `[N, *event]`, float32 or float64.
            seed: determines all random numbers, except those of dropout. None draws one from torch's generator.
        """
        name = "VFluxMatching"
        key = self.key(x, seed)
        options = self.options.with_strata(strata_for(self.joint_samples(x)))
        t = draw_from(self.times, key, x, philox.TIME, options.strata or 1)
        target, field = _v_flux_target(name, self.field, x, t, self.path, options, refs=self.refs(x), seed=key)
        normalizer: LossNormalizer | FixedScale | None = self.normalizer
        if normalizer is None:
            sigma = self.path.coefficients(target.per_sample(t).double()).sigma
            normalizer = FixedScale(2 / sigma.square().to(x.dtype))
        terms = normalized_terms(target, field, normalizer, options, t)
        loss = terms.total.mean()
        return loss, {"loss": loss.detach(), "flux": terms.flux.mean(), "tau": terms.tau.mean(), "t": t.mean()}
