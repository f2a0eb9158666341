"""Exponential Langevin steps (Eq. 8), the chain of them, and the pass that a training step needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import (
    Groups,
    as_number_tensor,
    check_finite,
    check_noise,
    check_points,
    check_steps,
    choose,
    group,
)
from fluxkernels.ops.kde import kde
from fluxkernels.ops.registration import Op, register_recomputed_autograd
from fluxkernels.ops.transition import average

_ARGUMENTS = "Tensor refs, Tensor sigma2, Tensor tau, int steps, Tensor? noise, Tensor? seed, str backend"


def _chain_fake(
    x0: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    return x0.new_empty(x0.shape)


def _pass_fake(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for _ in range(4))


chain = Op("langevin_chain", f"(Tensor x0, {_ARGUMENTS}) -> Tensor", _chain_fake)
bundle = Op("flux_pass", f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _pass_fake)


def _normal_fake(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


normal = Op("normal", "(Tensor seed, int[] shape, int stream, ScalarType dtype, str backend) -> Tensor", _normal_fake)


def _chain_of_ops(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    """The chain as `steps` calls of the kde op, whose backward pass the backend provides: (∂x_τ/∂x0)ᵀ v of Sec. 3.3."""
    if noise is None:
        assert seed is not None
        noise = normal(seed, (steps, *x.shape), philox.CHAIN, sigma2.dtype, backend)
    h = (tau / steps).view(-1, 1, 1)
    # √(1-e^{-2h}) has no derivative at h = 0; there it is left out of ∂x_τ/∂τ.
    spread = -torch.expm1(-2 * h)
    diffusion = (sigma2.view(-1, 1, 1) * torch.where(spread > 0, spread, spread.detach() + 1)).sqrt()
    diffusion = torch.where(spread > 0, diffusion, torch.zeros_like(diffusion))
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    dtype = x.dtype
    for k in range(steps):
        shift, _, _ = kde(x, refs, variance, backend)
        x = (x - torch.expm1(-h) * shift + diffusion * noise[k]).to(dtype)
    return x


def _pass_of_ops(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if noise is None:
        assert seed is not None
        start = normal(seed, (1, *x.shape), philox.START, sigma2.dtype, backend)[0]
    else:
        start = noise[0]
    x0 = (x + sigma2.view(-1, 1, 1).sqrt() * start).to(x.dtype)
    xt = _chain_of_ops(x0, refs, sigma2, tau, steps, None if noise is None else noise[1:], seed, backend)
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    return x0, kde(x0, refs, variance, backend)[0], xt, kde(xt, refs, variance, backend)[0]


register_recomputed_autograd(chain, _chain_of_ops)
register_recomputed_autograd(bundle, _pass_of_ops)


def _prepare(
    function: str,
    name: str,
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    times: dict[str, float | Tensor],
    draws: int | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    backend: str | None,
) -> tuple[Groups, tuple[Any, ...], str]:
    """Check and flatten: (groups, (x, refs, sigma2, time, noise `[draws, B, N, D]`, seed), backend).

    `draws` counts the entries of noise; None stands for a single one whose noise has the shape of x itself.
    """
    check_points(function, name, x)
    check_points(function, "refs", refs, like=x)
    check_finite(function, **{name: x, "refs": refs})
    variance = as_number_tensor(function, "sigma2", sigma2, like=x)
    ((time_name, time_value),) = times.items()
    time = as_number_tensor(function, time_name, time_value, like=x, zero=True)
    groups = group(function, **{name: x, "refs": refs})
    chosen = choose(backend, x.device)
    shape = (*(() if draws is None else (draws,)), *groups.batch, *x.shape[-2:])
    noise, seed = check_noise(function, noise, seed, shape, like=x)
    check_finite(function, noise=noise)
    if noise is None and seed is None and chosen == "torch":
        # Here, and only here, numbers need not be the same on another device: torch's own are the fastest.
        noise = torch.randn(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    flat_noise = None if noise is None else noise.reshape(draws or 1, -1, *x.shape[-2:])
    flat_seed = philox.as_seed(seed, x.device) if noise is None else None
    return (
        groups,
        (
            groups.points(x),
            groups.points(refs),
            groups.per_group("sigma2", variance),
            groups.per_group(time_name, time),
            flat_noise,
            flat_seed,
        ),
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
        refs: `[..., M, D]`, the centres; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one a group).
        h: step in units of σ² (dimensionless), h ≥ 0, same shapes as sigma2.
        noise: ξ, `[..., N, D]`.
        seed: makes ξ by Philox, the same on every device and backend; with neither, torch's generator decides.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`. Differentiable in every tensor it takes.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the backend named cannot run here.
    """
    groups, (z, *others, xi, seed), name = _prepare(
        "langevin_step", "x", x, refs, sigma2, {"h": h}, None, noise, seed, backend
    )
    return groups.unflatten(chain(z, *others, 1, xi, seed, name))


def langevin_chain(
    x0: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    steps: int = 4,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_τ: `steps` updates of `langevin_step`, each of size τ/steps (Sec. 3.3).

    Args:
        x0: `[..., N, D]`, where the chains start.
        refs: `[..., M, D]`, the centres; leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one a group).
        tau: τ = t/σ² ≥ 0, dimensionless time, same shapes as sigma2.
        steps: number K of updates.
        noise: ξ, `[steps, ..., N, D]`.
        seed: makes ξ by Philox, the same on every device and backend; with neither, torch's generator decides.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`. Its backward pass is the pathwise (∂x_τ/∂x0)ᵀ v; also differentiable in refs, sigma2, tau and
        noise. At τ = 0, where √(1-e^{-2τ}) has no derivative, ∂x_τ/∂τ is the drift's part alone.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the backend named cannot run here.
    """
    check_steps("langevin_chain", steps)
    groups, (z, *others, xi, seed), name = _prepare(
        "langevin_chain", "x0", x0, refs, sigma2, {"tau": tau}, steps, noise, seed, backend
    )
    return groups.unflatten(chain(z, *others, steps, xi, seed, name))


@dataclass(frozen=True)
class FluxPass:
    """What one training step needs of the kernel density estimate. Every tensor is `[..., N, D]`.

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
    _average: tuple[Groups, tuple[Tensor, ...], str]

    def transition_average(self, values: Tensor) -> Tensor:
        """Σ_j w_ij values_j as in `fluxkernels.transition_average`, for values `[..., N, V]`, without a second kde."""
        groups, (x0, shift0, xt, sigma2, tau), backend = self._average
        return average("FluxPass.transition_average", groups, x0, shift0, xt, values, sigma2, tau, backend)


def flux_pass(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    tau: float | Tensor,
    *,
    steps: int = 4,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> FluxPass:
    """Everything a Flux Matching step asks of the kernel density estimate, in one pass (Algorithm 1).

    x0 = x + σ n0, s(x0), x_τ = `langevin_chain`(x0), s(x_τ), and m(x0) for the transition weights.

    Args:
        x: `[..., N, D]`, clean samples.
        refs: `[..., M, D]`, the centres (x itself, or more); leading dimensions broadcast.
        sigma2: σ² > 0, a float or a tensor of shape `[]` or `[...]` (one a group).
        tau: τ = t/σ² ≥ 0, dimensionless, same shapes as sigma2.
        steps: number K of updates in the chain.
        noise: `[1 + steps, ..., N, D]`: n0, then the chain's ξ.
        seed: makes both by Philox; the chain's are those of `langevin_chain` with the same seed.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        A `FluxPass`. Its tensors are differentiable in every tensor given.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the backend named cannot run here.
    """
    check_steps("flux_pass", steps)
    groups, (z, centres, variance, time, xi, seed), name = _prepare(
        "flux_pass", "x", x, refs, sigma2, {"tau": tau}, 1 + steps, noise, seed, backend
    )
    x0, shift0, xt, shift_t = bundle(z, centres, variance, time, steps, xi, seed, name)

    def score(shift: Tensor) -> Tensor:
        return groups.unflatten((shift / variance.view(-1, 1, 1)).to(x.dtype))

    return FluxPass(
        groups.unflatten(x0),
        score(shift0),
        groups.unflatten(xt),
        score(shift_t),
        (groups, (x0, shift0, xt, variance, time), name),
    )
