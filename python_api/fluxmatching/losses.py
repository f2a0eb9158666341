"""Losses: Flux Matching (Eq. 6) and its noise-annealed form (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluxkernels import flux_pass, langevin_chain, residual_gradient
from fluxkernels.checks import as_number_tensor, check_seed, check_steps, check_tensor, one_of
from fluxmatching.draws import Draws
from fluxmatching.endpoint import METHODS, Field, call_field, endpoint_gradient
from fluxmatching.horizon import Horizon, UniformHorizon
from fluxmatching.layout import Layout
from fluxmatching.networks import check_samples_are_independent
from fluxmatching.noise import LossNormalizer
from fluxmatching.processes import check_shared, joined, rank_and_size, shared_seed

T = TypeVar("T")

ESTIMATORS = ("cross_chain", "single_chain")
DIVERGENCES = ("hutchinson", "exact")


@dataclass(frozen=True)
class FluxTarget:
    """What a Flux Matching step regresses on; ℓ_i = -2 (f(x0_i) - s(x0_i))·q̂_i. All detached.

    Attributes:
        x0: starts of the chains, `[N, *event]`.
        score: s(x0), shape of x0.
        target: q̂, shape of x0.
        tau: the horizon that was drawn, `[]`, or `[G]` in a grouped loss.
    """

    x0: Tensor
    score: Tensor
    target: Tensor
    tau: Tensor

    def loss(self, field: Field) -> Tensor:
        """The terms -2 u(x0) q̂ of ℓ, not yet summed over the event: shape of x0. Differentiable in the field."""
        return -2 * (call_field(field, self.x0.clone()) - self.score) * self.target


def flux_target(
    field: Field,
    x: Tensor,
    sigma2: float | Tensor,
    *,
    refs: Tensor | None = None,
    horizon: Horizon | None = None,
    grouped: bool = False,
    estimator: str = "cross_chain",
    endpoint: str | None = None,
    divergence: str = "hutchinson",
    chunk: int | None = None,
    endpoint_share: float = 1.0,
    gather: bool = False,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
    steps: int | None = None,
    backend: str | None = None,
) -> FluxTarget:
    """The detached half of the Flux Matching loss: where the field is evaluated, and q̂ there.

    Arguments and errors as in `flux_matching_loss`; a field with `endpoint="closed_form"` is a
    `fluxmatching.endpoint.ClosedForm`. For losses that need more than one number a
    sample, such as one for each group: `target.loss(field)` keeps the event's dimensions.
    """
    function = "flux_matching_loss"
    _check_callable(function, "field", field)
    check_tensor(function, "x", x)
    if x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{function}: x must be float32 or float64, got {x.dtype}; for a network in half precision keep the data "
            f"in float32 and use torch.autocast"
        )
    check_seed(function, seed)
    one_of(function, "estimator", estimator, ESTIMATORS)
    if endpoint is None:
        endpoint = "reverse" if x.dtype == torch.float64 or divergence == "exact" else "central"
    one_of(function, "endpoint", endpoint, METHODS)
    one_of(function, "divergence", divergence, DIVERGENCES)
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"{function}: chunk must be None or a positive number of samples, got {chunk!r}")
    if not isinstance(endpoint_share, Real) or isinstance(endpoint_share, bool) or not 0 < endpoint_share <= 1:
        raise ValueError(f"{function}: endpoint_share must lie in (0, 1], got {endpoint_share!r}")
    if endpoint != "closed_form" and not torch.compiler.is_compiling():
        check_samples_are_independent(function, field)
    draws = _instance(function, "draws", Draws() if draws is None else draws, Draws)
    horizon = _instance(function, "horizon", UniformHorizon() if horizon is None else horizon, Horizon)
    rank, processes = rank_and_size() if gather else (0, 1)
    if processes > 1:
        check_shared(function, "sigma2", as_number_tensor(function, "sigma2", sigma2, like=x))
        seed = shared_seed(seed, x.device)
        x, own = joined(x), slice(rank * len(x), (rank + 1) * len(x))
    layout = Layout(function, x, grouped)
    centres = layout.centres(x if refs is None else check_tensor(function, "refs", refs, like=x)).detach()
    variance = as_number_tensor(function, "sigma2", sigma2, like=x).detach()
    layout.check_number("sigma2", variance)
    draws.check(x, horizon, layout)
    steps = _steps(function, steps, draws)
    sigma = variance.sqrt()
    draws, key = draws.complete(
        x,
        seed,
        horizon,
        sigma,
        layout,
        steps=steps,
        endpoints=max(1, round(endpoint_share * len(x))) if endpoint_share < 1 else None,
        probing=divergence == "hutchinson",
        repeatable=estimator == "single_chain",
    )
    tau = draws.tau
    assert tau is not None

    noise = None
    if draws.start is not None and draws.chain is not None:
        noise = torch.stack([layout.to_points(n) for n in (draws.start, *draws.chain)])
    with torch.no_grad():
        bundle = flux_pass(
            layout.to_points(x), centres, variance, tau, steps=steps, noise=noise, seed=key, backend=backend
        )
    ends, scores = layout.from_points(bundle.xt), layout.from_points(bundle.score_t)
    probe = draws.probe if divergence == "hutchinson" else None
    chosen = draws.endpoints
    if processes > 1:  # the density estimate is cheap and everybody's; the network is not, and shared out
        chosen = (torch.arange(len(x), device=x.device) if chosen is None else chosen)[rank::processes]
    if chosen is not None:
        ends, scores = ends[chosen], scores[chosen]
        probe = None if probe is None else probe[chosen]
    bracket, field_at_end = endpoint_gradient(
        field,
        ends,
        scores,
        probe,
        method=endpoint,
        grouped=grouped,
        chunk=chunk,
        scale=_scale(x, variance) if endpoint == "central" else 1.0,
    )
    if not field_at_end.is_cuda and not torch.compiler.is_compiling() and not field_at_end.isfinite().all():
        at = f"sigma2 {variance.tolist()}, tau {tau.tolist()}" if variance.numel() == 1 else "the end of a chain"
        raise ValueError(f"{function}: field must be finite, got NaN or infinity at {at}")
    with torch.no_grad():
        gradient = layout.to_points(bracket)
        if len(ends):
            gradient = gradient + residual_gradient(
                layout.to_points(ends), layout.to_points(field_at_end), centres, variance, backend=backend
            )
        if chosen is not None:
            # Ends that nobody differentiates count as zero, and the others for them: right on average.
            share = 1.0 if draws.endpoints is None else len(draws.endpoints) / len(x)
            gradient = torch.zeros_like(bundle.xt).index_copy(-2, chosen, gradient / share)
            if processes > 1:
                torch.distributed.all_reduce(gradient)
        importance = torch.exp(-horizon.log_density(tau, sigma)).reshape(-1, 1, 1)
        if estimator == "cross_chain":
            # e^{-τ} is the Jacobian of the linearised chain, whose transition the weights are.
            target = torch.exp(-tau).reshape(-1, 1, 1) * importance * bundle.transition_average(gradient)
        else:
            chain_noise = None if noise is None else noise[1:]
            target = importance * _pathwise(
                bundle.x0, gradient, centres, variance, tau, steps=steps, noise=chain_noise, seed=key, backend=backend
            )
        target = target.reshape(bundle.x0.shape).to(x.dtype)
    parts = [layout.from_points(part) for part in (bundle.x0, bundle.score0, target)]
    return FluxTarget(*(parts if processes == 1 else [part[own] for part in parts]), tau)


def _check_callable(function: str, name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{function}: {name} must be callable, got {type(value).__name__}")


def _instance(function: str, name: str, value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{function}: {name} must be a {kind.__name__}, got {value!r}")
    return value


def _steps(function: str, steps: int | None, draws: Draws) -> int:
    """The number of Langevin updates: as asked, as many as `draws.chain` has, or 4."""
    given = None if draws.chain is None else draws.chain.shape[0]
    if steps is None:
        return given or 4
    if check_steps(function, steps) != (given or steps):
        raise ValueError(f"{function}: steps must be {given}, the length of draws.chain, got {steps}")
    return steps


def _pathwise(x0: Tensor, gradient: Tensor, *problem: Tensor, **chain: Any) -> Tensor:
    """(∂x_τ/∂x0)ᵀ gradient along each sample's own chain (Sec. 3.3), which runs again with the same noise."""
    with torch.enable_grad():
        start = x0.detach().requires_grad_()
        (pulled,) = torch.autograd.grad(langevin_chain(start, *problem, **chain), start, gradient)
    return pulled


def _scale(x: Tensor, variance: Tensor) -> Tensor:
    """Length over which a field at noise σ bends: √(σ² + σ_data²), the points' spread, but no more than 16 σ.

    σ_data² is the mean variance of a coordinate over the minibatch. A field that has learned the data bends over a few
    σ where σ is far below the spread; one step for all σ would be several σ long there.
    """
    data = (x - x.mean(0, keepdim=True)).to(variance.dtype).square().mean()
    return torch.minimum((variance.mean() + data).sqrt(), 16 * variance.amin().sqrt()).to(x.dtype)


def flux_matching_loss(
    field: Field,
    x: Tensor,
    sigma2: float | Tensor,
    *,
    refs: Tensor | None = None,
    horizon: Horizon | None = None,
    grouped: bool = False,
    estimator: str = "cross_chain",
    endpoint: str | None = None,
    divergence: str = "hutchinson",
    chunk: int | None = None,
    endpoint_share: float = 1.0,
    gather: bool = False,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
    steps: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Flux Matching loss of a vector field (Eq. 6, Algorithm 1), one number a sample.

    ℓ_i = -2 u(x0_i)·q̂_i, u = f - s, with s the score of the kernel density estimate on `refs`, x0 = x + σ n0 and
    q̂_i = e^{-τ}/q(τ) Σ_j w_ij ∇r(x_τ^j) detached, r = ∇·u + u·s. Its gradient is that of the projected Fisher
    divergence (Theorem 3.1) in dimensionless time: E ℓ = (2/σ²) E|Π f - s|². Fields that leave p_σ in place have
    mean 0. A single ℓ_i can be negative.

    Args:
        field: maps `[n, *event]` to the same shape, each sample by itself.
        x: clean minibatch, `[N, *event]`, float32 or float64; grouped: `[N, G, D]`.
        sigma2: σ² > 0 in squared units of x, one value a minibatch (grouped: or one a group, `[G]`).
        refs: centres of the kernel density estimate, `[M, *event]`, or grouped `[M, G, D]` or `[M, 1, D]`. Default x.
        horizon: distribution of τ; default `UniformHorizon()` on [0, 4]. As one τ serves a minibatch, the spread of
            e^{-τ}/q(τ) goes into every gradient; `TruncatedExponentialHorizon(1.0)` has none.
        grouped: one independent kernel density estimate for each index of the second dimension (one a gene).
        estimator: "cross_chain" averages over all chains of the minibatch (Eq. 9); "single_chain" takes each sample's
            own chain, differentiated pathwise (Sec. D.2).
        endpoint: how the field's second derivatives at x_τ are taken; see `fluxmatching.endpoint`. "reverse" and
            "forward" are exact; "central" needs no double backward, and half the time or less; None takes it, but
            "reverse" where exactness is asked for, by x in float64 or an exact divergence. "closed_form" asks the
            field, by its method `endpoint_gradient(z, score, probe)`, for (∇(∇·f) + J_fᵀ s, f) if probe is None, as it
            is with the exact divergence, and else for (∇(εᵀ J_f ε) + J_fᵀ s, f), ε the probe; all in the shape of z,
            `[n, *event]`.
        divergence: "hutchinson" (one probe ε of random signs) or "exact" (one pass for each coordinate; grouped: for
            each coordinate of a group, which supposes that the field does not mix groups).
        chunk: samples that go through the endpoint's derivatives at once; None for all. Bounds the memory.
        endpoint_share: share of the chains, in (0, 1], whose end is differentiated, drawn anew each time; the others
            count as zero and these for them. Unbiased, noisier, and less time.
        gather: whether the minibatches of all processes of torch.distributed, of one size, make up one: one density
            estimate and one average over chains. The network still sees each sample in one process only. The result
            is that of the process's own samples; `draws` are of the joint minibatch, `sigma2`, `refs` and `seed` the
            same everywhere.
        draws: fixes any of the random numbers.
        seed: fixes all others, the same numbers on every device and backend. None: torch's generator.
        steps: Langevin updates of a chain; None takes as many as `draws.chain` has, or the paper's 4.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        ℓ, `[N]`, summed over the event. Differentiable in the field's parameters; take its mean as the loss.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the backend named cannot run here.
    """
    target = flux_target(
        field,
        x,
        sigma2,
        refs=refs,
        horizon=horizon,
        grouped=grouped,
        estimator=estimator,
        endpoint=endpoint,
        divergence=divergence,
        chunk=chunk,
        endpoint_share=endpoint_share,
        gather=gather,
        draws=draws,
        seed=seed,
        steps=steps,
        backend=backend,
    )
    return target.loss(field).flatten(1).sum(1)


@dataclass(frozen=True)
class AnnealedLoss:
    """What `noise_annealed_flux_loss` returns; minimise `total.mean()`.

    Attributes:
        total: Eq. 11, plus Eq. 51 if the horizon is learned, `[N]`.
        flux: the Flux Matching loss alone, detached, `[N]`.
        tau: the horizon that was drawn, `[]`.
    """

    total: Tensor
    flux: Tensor
    tau: Tensor


def noise_annealed_flux_loss(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: float | Tensor,
    normalizer: LossNormalizer,
    *,
    horizon: Horizon | None = None,
    refs: Tensor | None = None,
    estimator: str = "cross_chain",
    endpoint: str | None = None,
    divergence: str = "hutchinson",
    chunk: int | None = None,
    endpoint_share: float = 1.0,
    gather: bool = False,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
    steps: int | None = None,
    backend: str | None = None,
) -> AnnealedLoss:
    """Noise-annealed Flux Matching at one noise level: ℓ^σ / exp(s_η(σ)) + s_η(σ) (Eq. 11).

    If the horizon is learned, -sg(ℓ^σ / exp(s_η(σ))) log q(τ) is added (Eq. 51). Its gradient reaches the horizon's
    parameters alone, so one optimiser can hold the network, the normalizer and the horizon.

    Args:
        field: f(z, σ), z `[n, *event]`, σ of shape `[]`.
        x: clean minibatch, `[N, *event]`.
        sigma: σ > 0, shared by the minibatch.
        normalizer: s_η.
        endpoint: as in `flux_matching_loss`, but for "closed_form": the method knows no σ.
        The others: as in `flux_matching_loss`.
    """
    for name, value in (("field", field), ("normalizer", normalizer)):
        _check_callable("noise_annealed_flux_loss", name, value)
    check_tensor("noise_annealed_flux_loss", "x", x)
    level = as_number_tensor("noise_annealed_flux_loss", "sigma", sigma, like=x)
    if level.ndim:
        raise ValueError(f"noise_annealed_flux_loss: sigma must be one number, got shape {list(level.shape)}")
    horizon = UniformHorizon() if horizon is None else horizon
    if endpoint == "closed_form":
        raise ValueError(
            "noise_annealed_flux_loss: endpoint='closed_form' is for fields f(z) without a noise level; give one that "
            "holds its own σ to flux_matching_loss"
        )
    at_level: Field = lambda z: field(z, level)  # noqa: E731
    target = flux_target(
        at_level,
        x,
        level.square(),
        refs=refs,
        horizon=horizon,
        estimator=estimator,
        endpoint=endpoint,
        divergence=divergence,
        chunk=chunk,
        endpoint_share=endpoint_share,
        gather=gather,
        draws=draws,
        seed=seed,
        steps=steps,
        backend=backend,
    )
    flux = target.loss(at_level).flatten(1).sum(1)
    total = normalizer(flux, level)
    if horizon.learned:
        relative = flux.detach() * (-normalizer.log_scale(level).detach()).exp()
        total = total + horizon.fit_loss(target.tau, relative, level)
    return AnnealedLoss(total, flux.detach(), target.tau)
