"""Target of the Flux Matching regression (Algorithm 1): prepare, draw, run the chains, differentiate, average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxkernels import FluxPass, compiling, flux_pass, langevin_chain, residual_gradient
from fluxkernels.checks import can_check_values, check_finite, check_seed, check_tensor
from fluxkernels.devices import check_derivatives_traceable
from fluxmatching.distributed import JointMinibatch
from fluxmatching.engines import check_differentiable_twice, without_engine
from fluxmatching.field_modules import check_no_cached_parametrizations, check_samples_are_independent
from fluxmatching.fields import Field, call_field, per_sample
from fluxmatching.losses.draws import DrawRequest, Draws
from fluxmatching.losses.grouping import Grouping
from fluxmatching.losses.horizons import DEFAULT_HORIZON, Horizon
from fluxmatching.losses.options import FluxOptions, as_sigma, check_not_half, check_options
from fluxmatching.losses.second_derivatives import ConditionedField, endpoint_gradient, rows_of


@dataclass(frozen=True)
class MatchedField:
    """Field w(z) = a z + b s(z) whose flux a loss matches; the score itself is a = 0, b = 1.

    Attributes:
        linear: a, a number, or a tensor `[]`, or one per stratum, `[strata]`.
        score: b, likewise.
    """

    linear: float | Tensor = 0.0
    score: float | Tensor = 1.0


@dataclass(frozen=True)
class FluxTarget:
    """Regression target of a Flux Matching step; ℓ_i = -2 (f(x0_i) - w(x0_i))·q̂_i. All tensors are detached.

    Attributes:
        x0: starts of the chains, `[N, *event]`.
        score: s(x0), shape of x0.
        matched: w(x0), the field whose flux is matched, shape of x0; the score unless a `MatchedField` was given.
        target: q̂, shape of x0.
        tau: the horizon that was drawn, `[]`, or `[G]` in a grouped loss, or `[strata]`.
        sigma: σ, `[]`, or `[G]` in a grouped loss, or one per sample, `[N]`, where strata differ in it.
        stratum: index of each sample's stratum, `[N]`, or None for a single one.
        refs: reference points of the density estimate, in the layout of the ops: `[M, D]`, or `[G, M, D]`, `[1, M, D]`.
    """

    x0: Tensor
    score: Tensor
    matched: Tensor
    target: Tensor
    tau: Tensor
    sigma: Tensor
    stratum: Tensor | None
    refs: Tensor

    def per_sample(self, number: Tensor) -> Tensor:
        """Return one number per sample, `[N]`, of one per stratum, `[strata]`; any other as it is."""
        return number if self.stratum is None or not number.ndim else number[self.stratum]

    def terms(self, field: Field) -> Tensor:
        """Return the products -2 u(x0) q̂ before the sum over the event, shape of x0; differentiable in the field."""
        return -2 * (call_field(field, self.x0.clone()) - self.matched) * self.target

    def loss(self, field: Field) -> Tensor:
        """Return ℓ, one number per sample, `[N]`; differentiable in the field."""
        return self.terms(field).flatten(1).sum(1)


def flux_target(
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
    matched: MatchedField | None = None,
) -> FluxTarget:
    """Compute the regression target of Flux Matching and the points where it holds, without gradients.

    Arguments and errors as in `flux_matching_loss`. Useful where a loss needs more than one number per sample, such
    as one per group: `FluxTarget.terms` keeps the dimensions of the event.

    Args:
        field: also a `ConditionedField` f(z, c), with c of shape `[]`, or one per stratum, `[strata]`: the field then
            receives one per sample, `[n]`.
        matched: field whose flux is matched; None for the score.
    """
    return build_target("flux_target", field, x, sigma, options, matched, refs=refs, draws=draws, seed=seed)


def build_target(
    function: str,
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: FluxOptions,
    matched: MatchedField | None = None,
    **given: Any,
) -> FluxTarget:
    """Compute `flux_target` for a function that is named in error messages; given are its refs, draws and seed."""
    check_options(function, options, FluxOptions)
    batch = _prepare(function, field, x, sigma, options.with_strata(1), **given)
    chains = _run_chains(batch)
    gradient = _differentiate_endpoints(field, batch, chains, matched)
    return _average_over_chains(batch, chains, gradient, matched)


@dataclass(frozen=True)
class _Minibatch:
    """A minibatch after all checks, with its random numbers drawn.

    Attributes:
        x: samples, of all processes where minibatches are joined.
        sigma, variance: σ and σ², `[]`, or `[G]` in a grouped loss, or `[strata]`.
        refs: reference points in the layout of the ops, `[M, D]` or `[G, M, D]`.
        draws: random numbers, complete but for start and chain, which the kernels make from `key`.
        noise: n0 and ξ in that layout, `[1 + num_steps, ..., N, D]`, or None.
    """

    options: FluxOptions
    x: Tensor
    sigma: Tensor
    variance: Tensor
    refs: Tensor
    grouping: Grouping
    horizon: Horizon
    draws: Draws
    key: Tensor | None
    noise: Tensor | None
    num_steps: int
    joint: JointMinibatch

    @property
    def tau(self) -> Tensor:
        assert self.draws.tau is not None
        return self.draws.tau

    @property
    def strata(self) -> int:
        return self.options.strata or 1

    def per_sample(self, number: Tensor) -> Tensor:
        """Return one number per sample, `[N]`, where there is one per stratum; any other number as it is."""
        strata = self.strata
        return number.repeat_interleave(self.x.shape[0] // strata) if strata > 1 and number.ndim else number

    def number(self, value: float | Tensor) -> Tensor:
        """Return a number, or one per stratum, as a tensor with the dtype and device of x."""
        if not isinstance(value, Tensor):  # a copy would make the host wait for the device
            return torch.full((), value, dtype=self.x.dtype, device=self.x.device)
        return value.to(self.x)

    def per_event(self, value: float | Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return a number, or one per stratum, to broadcast against x, or against the chosen samples of it."""
        number = self.per_sample(self.number(value))
        return per_sample(number if chosen is None else rows_of(number, chosen), self.x)

    def to_strata(self, points: Tensor) -> Tensor:
        """Return points `[..., N, D]` as `[..., strata, N / strata, D]` where there are several strata."""
        strata = self.strata
        return points if strata == 1 else points.unflatten(-2, (strata, -1))

    def from_strata(self, points: Tensor) -> Tensor:
        """Return points `[strata, N / strata, D]` as `[N, D]`."""
        return points if self.strata == 1 else points.flatten(0, 1)


def _prepare(
    function: str,
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: FluxOptions,
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> _Minibatch:
    """Check every argument, join the minibatches of all processes if requested, and draw random numbers."""
    _check_field_and_samples(function, field, x, options)
    check_seed(function, seed)
    if draws is not None and not isinstance(draws, Draws):
        raise TypeError(f"{function}: draws must be a Draws, got {draws!r}")
    draws = Draws() if draws is None else draws
    horizon = DEFAULT_HORIZON if options.horizon is None else options.horizon
    level, variance = as_sigma(function, sigma, like=x)
    joint = JointMinibatch(options.gather_across_ranks)
    x, seed = joint.join(function, x, level, seed)
    grouping = Grouping(function, x, options.grouped)
    check_finite(function, x=x)
    joint.check_refs(function, refs)
    points = grouping.refs_to_points(x if refs is None else check_tensor(function, "refs", refs, like=x)).detach()
    check_finite(function, refs=refs)
    if options.strata == 1 or list(level.shape) != [options.strata]:
        grouping.check_number("sigma", level)
    strata = options.strata
    assert strata is not None
    if x.shape[0] % strata:
        raise ValueError(f"{function}: strata must divide the {x.shape[0]} samples of x, got {strata}")
    draws.check(x, horizon, grouping, strata)
    num_steps = _num_steps(function, options.num_steps, draws)
    request = DrawRequest(
        x,
        horizon,
        level,
        grouping,
        num_steps,
        num_endpoints=options.num_endpoints(x.shape[0]),
        needs_probe=options.divergence == "hutchinson",
        runs_chain_twice=options.estimator == "single_chain",
        strata=strata,
    )
    draws, key = draws.complete(request, seed)
    noise = None
    if draws.start is not None and draws.chain is not None:
        noise = torch.stack([grouping.to_points(n) for n in (draws.start, *draws.chain)])
    return _Minibatch(
        options, x, level, variance, points, grouping, horizon, draws, key, noise, num_steps, joint
    )  # fmt: skip


def _check_field_and_samples(function: str, field: Field, x: Tensor, options: FluxOptions) -> None:
    field = field.field if isinstance(field, ConditionedField) else field
    if not callable(field):
        raise TypeError(f"{function}: field must be callable, got {type(field).__name__}")
    check_tensor(function, "x", x)
    check_not_half(function, "x", x)
    if not torch.compiler.is_compiling():  # where the whole loss is compiled, see `_differentiate_endpoints`
        _check_networks(function, field, options.method_for(x.dtype))


@compiling.disable
def _check_networks(function: str, field: Callable[..., Tensor], method: str) -> None:
    check_no_cached_parametrizations(function, field)
    if method != "closed_form":
        check_samples_are_independent(function, field)
        check_differentiable_twice(function, field, method)


def _num_steps(function: str, num_steps: int | None, draws: Draws) -> int:
    """Return the number of Langevin updates: that of the options, the length of `draws.chain`, or 4."""
    given = None if draws.chain is None else draws.chain.shape[0]
    if num_steps is not None and given is not None and num_steps != given:
        raise ValueError(f"{function}: num_steps must be {given}, the length of draws.chain, got {num_steps}")
    return num_steps or given or 4


def _run_chains(batch: _Minibatch) -> FluxPass:
    """Simulate the Langevin chains in the field of the kernel density estimate."""
    with torch.no_grad():
        return flux_pass(
            batch.to_strata(batch.grouping.to_points(batch.x)),
            batch.refs,
            batch.variance,
            batch.tau,
            num_steps=batch.num_steps,
            noise=None if batch.noise is None else batch.to_strata(batch.noise),
            seed=batch.key,
            backend=batch.options.backend,
        )


def _inner_field(function: str, field: Callable[..., Tensor], batch: _Minibatch) -> Callable[..., Tensor]:
    """Return the field without an engine around it, its condition as one number or one per sample."""
    if isinstance(field, ConditionedField):
        return field.replace(without_engine(function, field.field), batch.per_sample(field.condition))
    return without_engine(function, field)


def _differentiate_endpoints(
    field: Callable[..., Tensor], batch: _Minibatch, chains: FluxPass, matched: MatchedField | None
) -> Tensor:
    """Return ∇r at all endpoints, in the layout of the ops; zero at omitted endpoints, the others rescaled."""
    options, grouping = batch.options, batch.grouping
    field = _inner_field(grouping.function, field, batch)
    ends, scores = (grouping.from_points(batch.from_strata(points)) for points in (chains.xt, chains.score_t))
    probe = batch.draws.probe if options.divergence == "hutchinson" else None
    method = options.method_for(batch.x.dtype)
    scale = _length_scale(batch) if method == "finite_difference" else torch.ones_like(batch.variance.amin())
    if torch.compiler.is_compiling() and method in ("double_backward", "finite_difference"):  # which break the graph
        _check_networks(grouping.function, field, method)
    chosen = batch.joint.own_endpoints(batch.x, batch.draws.endpoints)
    if chosen is not None:
        ends, scores = ends[chosen], scores[chosen]
        probe = None if probe is None else probe[chosen]
        scale = rows_of(scale, chosen) if batch.strata > 1 else scale
        field = field.rows(chosen) if isinstance(field, ConditionedField) else field
    bracket, field_at_end = endpoint_gradient(
        field,
        ends,
        scores,
        probe,
        method=method,
        grouped=options.grouped,
        chunk_size=options.chunk_size,
        scale=scale,
    )
    _check_finite_field(grouping.function, field_at_end, batch)
    with torch.no_grad():
        gradient = grouping.to_points(bracket)
        if ends.shape[0] and matched is None:
            gradient = gradient + _residual_gradient(batch, ends, field_at_end, chains, chosen)
        elif ends.shape[0] and matched is not None:
            linear, factor = batch.per_event(matched.linear, chosen), batch.number(matched.score)
            mismatch = field_at_end - linear * ends
            gradient = gradient + _residual_gradient(batch, ends, mismatch, chains, chosen, factor)
            gradient = gradient - grouping.to_points(linear * scores)
        if chosen is not None:
            # Omitted endpoints count as zero and the others are rescaled, so the mean over choices is unbiased.
            fraction = 1.0 if batch.draws.endpoints is None else batch.draws.endpoints.shape[0] / batch.x.shape[0]
            gradient = torch.zeros_like(batch.from_strata(chains.xt)).index_copy(-2, chosen, gradient / fraction)
        return batch.joint.sum(gradient)


def _residual_gradient(
    batch: _Minibatch,
    ends: Tensor,
    values: Tensor,
    chains: FluxPass,
    chosen: Tensor | None,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Return J_s g - b ∇(Δp̂/p̂) for a field's values g at the chosen endpoints and factors b, in the ops' layout."""
    points, values = (batch.grouping.to_points(t) for t in (ends, values))
    backend = batch.options.backend
    shared = not batch.variance.ndim and not (isinstance(factor, Tensor) and factor.ndim)
    if batch.strata == 1 or shared:
        return residual_gradient(points, values, batch.refs, batch.variance, factor=factor, backend=backend)
    # Strata with numbers of their own: all endpoints, in their layout, with a field of zero at those not chosen.
    if chosen is not None:
        values = torch.zeros_like(batch.from_strata(chains.xt)).index_copy(0, chosen, values)
    found = batch.from_strata(
        residual_gradient(
            chains.xt, batch.to_strata(values), batch.refs, batch.variance, factor=factor, backend=backend
        )
    )
    return found if chosen is None else found[chosen]


def _check_finite_field(function: str, field_at_end: Tensor, batch: _Minibatch) -> None:
    if not can_check_values(field_at_end) or field_at_end.isfinite().all():
        return
    one = batch.sigma.numel() == batch.tau.numel() == 1
    at = f"sigma {batch.sigma.item():.6g}, tau {batch.tau.item():.6g}" if one else "the end of a chain"
    raise ValueError(f"{function}: field must be finite, got NaN or infinity at {at}")


def _average_over_chains(
    batch: _Minibatch, chains: FluxPass, gradient: Tensor, matched: MatchedField | None
) -> FluxTarget:
    """Average ∇r over chains (Eq. 9) or pull it back along each chain (Sec. 3.3), weighted by 1/q(τ)."""
    gradient = batch.to_strata(gradient)
    with torch.no_grad():
        importance = torch.exp(-batch.horizon.log_density(batch.tau, batch.sigma)).reshape(-1, 1, 1)
        if batch.options.estimator == "cross_chain":
            # e^{-τ} is the Jacobian of the linearized chain, whose transition the weights are.
            jacobian = torch.exp(-batch.tau).reshape(-1, 1, 1)
            target = jacobian * importance * chains.transition_average(gradient)
        else:
            target = importance * _pull_back(chains.x0, gradient, batch)
        target = target.reshape(chains.x0.shape).to(batch.x.dtype)

    def samples(points: Tensor) -> Tensor:
        return batch.grouping.from_points(batch.from_strata(points))

    own = batch.joint.own_samples
    x0, score = samples(chains.x0), samples(chains.score0)
    wanted = score
    if matched is not None:
        wanted = batch.per_event(matched.linear) * x0 + batch.per_event(matched.score) * score

    sigma = batch.per_sample(batch.sigma)
    if sigma.ndim and not batch.options.grouped:
        sigma = batch.joint.own_samples(sigma)
    stratum = None
    if batch.strata > 1:
        stratum = own(batch.per_sample(torch.arange(batch.strata, device=x0.device)))
    x0, score, wanted, target = (own(points) for points in (x0, score, wanted, samples(target)))
    return FluxTarget(x0, score, wanted, target, batch.tau, sigma, stratum, batch.refs)


def _pull_back(x0: Tensor, gradient: Tensor, batch: _Minibatch) -> Tensor:
    """Return (∂x_τ/∂x0)ᵀ gradient along each sample's own chain, which runs again with the same noise."""
    chain: dict[str, Any] = {
        "num_steps": batch.num_steps,
        "noise": None if batch.noise is None else batch.to_strata(batch.noise[1:]),
        "seed": batch.key,
        "backend": batch.options.backend,
    }
    check_derivatives_traceable("estimator='single_chain'")
    with torch.enable_grad():
        start = x0.detach().requires_grad_()
        end = langevin_chain(start, batch.refs, batch.variance, batch.tau, **chain)
        (pulled,) = torch.autograd.grad(end, start, gradient)
    return pulled


def _length_scale(batch: _Minibatch) -> Tensor:
    """Return the length over which a field at noise σ varies: √(σ² + σ_data²), but at most 16 σ.

    One number, or one per sample, `[N]`, where strata have a σ of their own.

    σ_data² is the mean variance of a coordinate over the minibatch. A field that has learned the data varies over
    a few σ where σ is far below the spread. A step independent of σ would be several σ long at small σ.
    """
    x, variance = batch.x, batch.variance
    data = (x - x.mean(0, keepdim=True)).to(variance.dtype).square().mean()
    if batch.strata > 1:
        return batch.per_sample(torch.minimum((variance + data).sqrt(), 16 * variance.sqrt())).to(x.dtype)
    return torch.minimum((variance.mean() + data).sqrt(), 16 * variance.amin().sqrt()).to(x.dtype)
