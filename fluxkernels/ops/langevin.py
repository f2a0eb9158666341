"""Exponential Langevin steps (Eq. 8), chains of them, and the kernel density estimates of a training step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import (
    Groups,
    as_number_tensor,
    check_finite,
    check_groups,
    check_noise,
    check_num_steps,
    pick_backend,
)
from fluxkernels.ops.kde import kde_op, quotient
from fluxkernels.ops.registration import Op, register_recomputed_autograd
from fluxkernels.ops.transition import Transition

_ARGUMENTS = "Tensor refs, Tensor sigma2, Tensor tau, int num_steps, Tensor? noise, Tensor? seed, str backend"


def _chain_fake(
    x0: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    return x0.new_empty(x0.shape)


def _pass_fake(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for _ in range(4))


langevin_chain_op = Op("langevin_chain", f"(Tensor x0, {_ARGUMENTS}) -> Tensor", _chain_fake)
flux_pass_op = Op("flux_pass", f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _pass_fake)


def _normal_fake(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


normal_op = Op(
    "normal", "(Tensor seed, int[] shape, int stream, ScalarType dtype, str backend) -> Tensor", _normal_fake
)


def _chain_of_ops(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    """The chain as `num_steps` calls of the kde op, whose backward pass is the backend's: (∂x_τ/∂x0)ᵀ v of Sec. 3.3."""
    if noise is None:
        assert seed is not None
        noise = normal_op(seed, (num_steps, *x.shape), philox.CHAIN, sigma2.dtype, backend)
    h = (tau / num_steps).view(-1, 1, 1)
    # √(1-e^{-2h}) has no derivative at h = 0, so ∂x_τ/∂τ omits it there.
    spread = -torch.expm1(-2 * h)
    diffusion = (sigma2.view(-1, 1, 1) * torch.where(spread > 0, spread, spread.detach() + 1)).sqrt()
    diffusion = torch.where(spread > 0, diffusion, torch.zeros_like(diffusion))
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    dtype = x.dtype
    for k in range(num_steps):
        shift, _, _ = kde_op(x, refs, variance, backend, results=("shift",))
        x = (x - torch.expm1(-h) * shift + diffusion * noise[k]).to(dtype)
    return x


def _pass_of_ops(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if noise is None:
        assert seed is not None
        start = normal_op(seed, (1, *x.shape), philox.START, sigma2.dtype, backend)[0]
    else:
        start = noise[0]
    x0 = (x + sigma2.view(-1, 1, 1).sqrt() * start).to(x.dtype)
    xt = _chain_of_ops(x0, refs, sigma2, tau, num_steps, None if noise is None else noise[1:], seed, backend)
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    shift0, shift_t = (kde_op(end, refs, variance, backend, results=("shift",))[0] for end in (x0, xt))
    return x0, shift0, xt, shift_t


register_recomputed_autograd(langevin_chain_op, _chain_of_ops)
register_recomputed_autograd(flux_pass_op, _pass_of_ops)


class _Random(NamedTuple):
    """The user's source of random numbers.

    Attributes:
        noise: the numbers themselves, or None.
        seed: a seed, or None.
        draws: number of entries of the noise; None if it is a single one in the shape of the points.
    """

    noise: Tensor | None
    seed: int | Tensor | None
    draws: int | None

    def flat(self, function: str, groups: Groups, x: Tensor, backend: str) -> tuple[Tensor | None, Tensor | None]:
        """(noise `[draws, B, N, D]` or None, seed `[]` or None), checked."""
        shape = (*(() if self.draws is None else (self.draws,)), *groups.batch, *x.shape[-2:])
        noise, seed = check_noise(function, self.noise, self.seed, shape, like=x)
        if noise is not None:
            check_finite(function, noise=noise)
        if noise is None and seed is None and backend == "torch":
            # Only here may the numbers differ between devices: torch's own generator is the fastest.
            noise = torch.randn(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if noise is None:
            return None, philox.as_seed(seed, x.device, f"{function}: seed")
        return noise.reshape(self.draws or 1, -1, *x.shape[-2:]), None


class _Chain(NamedTuple):
    """Arguments of the chain ops, checked and flattened into B groups.

    Attributes:
        groups: the leading dimensions of the user's tensors.
        x: `[B, N, D]`.
        refs: `[B, M, D]`.
        sigma2: σ² `[B]`.
        time: τ of the whole chain, `[B]`.
        noise: `[draws, B, N, D]`, or None.
        seed: `[]`, or None.
        backend: name of the backend.
    """

    groups: Groups
    x: Tensor
    refs: Tensor
    sigma2: Tensor
    time: Tensor
    noise: Tensor | None
    seed: Tensor | None
    backend: str

    def run(self, op: Op, num_steps: int) -> Any:
        return op(self.x, self.refs, self.sigma2, self.time, num_steps, self.noise, self.seed, self.backend)


def _prepare(
    function: str,
    points: tuple[str, Tensor],
    refs: Tensor,
    sigma2: float | Tensor,
    time: tuple[str, float | Tensor],
    random: _Random,
    backend: str | None,
) -> _Chain:
    """Check and flatten; `points` and `time` are given with the names of the arguments."""
    name, x = points
    time_name, time_value = time
    groups = check_groups(function, **{name: x, "refs": refs})
    variance = as_number_tensor(function, "sigma2", sigma2, like=x)
    duration = as_number_tensor(function, time_name, time_value, like=x, zero=True)
    chosen = pick_backend(backend, x.device)
    noise, seed = random.flat(function, groups, x, chosen)
    return _Chain(
        groups,
        groups.points(x),
        groups.points(refs),
        groups.per_group("sigma2", variance),
        groups.per_group(time_name, duration),
        noise,
        seed,
        chosen,
    )


def langevin_step(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    h: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One exponentially integrated Langevin update (Eq. 8) in the field of the kernel density estimate.

    x ← ρ x + (1-ρ) m(x) + σ √(1-ρ²) ξ, with ρ = e^{-h} and m of `kde_mean`.

    Args:
        x: `[..., N, D]`.
        refs: `[..., M, D]`, the reference points; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one per group).
        h: step in units of σ² (dimensionless), h ≥ 0, same shapes as sigma2.
        noise: ξ, `[..., N, D]`.
        seed: seed of ξ (Philox, same numbers on every device and backend). Without noise and seed, ξ comes from torch's
            generator.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`. Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    chain = _prepare("langevin_step", ("x", x), refs, sigma2, ("h", h), _Random(noise, seed, None), backend)
    return chain.groups.unflatten(chain.run(langevin_chain_op, 1))


def langevin_chain(
    x0: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    num_steps: int = 4,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_τ: `num_steps` updates of `langevin_step`, each of size τ/num_steps (Sec. 3.3).

    Args:
        x0: `[..., N, D]`, where the chains start.
        refs: `[..., M, D]`, the reference points; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one per group).
        tau: τ = t/σ² ≥ 0, dimensionless time, same shapes as sigma2.
        num_steps: number K of updates.
        noise: ξ, `[num_steps, ..., N, D]`.
        seed: seed of ξ (Philox, same numbers on every device and backend). Without noise and seed, ξ comes from torch's
            generator.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`. Its backward pass is the pathwise (∂x_τ/∂x0)ᵀ v; also differentiable in refs, sigma2, tau and
        noise. At τ = 0, where √(1-e^{-2τ}) has no derivative, ∂x_τ/∂τ is the part of the drift alone.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    check_num_steps("langevin_chain", num_steps)
    random = _Random(noise, seed, num_steps)
    chain = _prepare("langevin_chain", ("x0", x0), refs, sigma2, ("tau", tau), random, backend)
    return chain.groups.unflatten(chain.run(langevin_chain_op, num_steps))


@dataclass(frozen=True)
class FluxPass:
    """Results of `flux_pass`. Every tensor is `[..., N, D]`.

    Attributes:
        x0: start of the chains, x + σ n0.
        score0: s(x0).
        xt: end of the chains, x_τ.
        score_t: s(x_τ).
    """

    x0: Tensor
    score0: Tensor
    xt: Tensor
    score_t: Tensor
    _transition: Transition

    def transition_average(self, values: Tensor) -> Tensor:
        """Σ_j w_ij values_j as in `fluxkernels.transition_average`, for values `[..., N, V]`, without a second kde."""
        return self._transition.average("FluxPass.transition_average", values)


def flux_pass(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    num_steps: int = 4,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> FluxPass:
    """The kernel density estimates of one Flux Matching step, in one pass (Algorithm 1).

    x0 = x + σ n0, s(x0), x_τ = `langevin_chain`(x0), s(x_τ), and m(x0) for the transition weights.

    Args:
        x: `[..., N, D]`, clean samples.
        refs: `[..., M, D]`, the reference points (x itself, or more); leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one per group).
        tau: τ = t/σ² ≥ 0, dimensionless, same shapes as sigma2.
        num_steps: number K of updates in the chain.
        noise: `[1 + num_steps, ..., N, D]`: n0, then the chain's ξ.
        seed: seed of both (Philox); the chain's numbers are those of `langevin_chain` with the same seed.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        A `FluxPass`. Its tensors are differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    check_num_steps("flux_pass", num_steps)
    random = _Random(noise, seed, 1 + num_steps)
    chain = _prepare("flux_pass", ("x", x), refs, sigma2, ("tau", tau), random, backend)
    groups, variance = chain.groups, chain.sigma2
    x0, shift0, xt, shift_t = chain.run(flux_pass_op, num_steps)
    return FluxPass(
        groups.unflatten(x0),
        groups.unflatten(quotient(shift0, variance.view(-1, 1, 1))),
        groups.unflatten(xt),
        groups.unflatten(quotient(shift_t, variance.view(-1, 1, 1))),
        Transition(groups, x0, shift0, xt, variance, chain.time, chain.backend),
    )
