"""Minibatch kernel density estimate (Eq. 7): score, mean and log-density."""

import math
from typing import Any

import torch
from torch import Tensor

from fluxkernels.checks import Groups, as_number_tensor, check_groups, pick_backend
from fluxkernels.ops.kernel_average import Averaging, Weighting
from fluxkernels.ops.registration import Op, register_recomputed_autograd


def _fake(z: Tensor, refs: Tensor, sigma2: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:-1])


def _backward_fake(
    g_shift: Tensor,
    g_mean: Tensor,
    g_log_density: Tensor,
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), refs.new_empty(refs.shape), sigma2.new_empty(sigma2.shape)


kde_op = Op("kde", "(Tensor z, Tensor refs, Tensor sigma2, str backend) -> (Tensor, Tensor, Tensor)", _fake)
kde_backward_op = Op(
    "kde_backward",
    "(Tensor g_shift, Tensor g_mean, Tensor g_log_density, Tensor z, Tensor refs, Tensor sigma2, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    z, refs, sigma2 = ctx.saved_tensors
    shapes = z.shape, z.shape, z.shape[:-1]
    # A result that the call left out has no cotangent.
    filled = (z.new_zeros(shape) if g is None else g for g, shape in zip(cotangents, shapes, strict=True))
    return *kde_backward_op(*filled, z, refs, sigma2, ctx.backend), None


kde_op.register_autograd(_backward, setup_context=_setup_context)
# Every backend computes second derivatives in the same plain PyTorch: training never needs them.
register_recomputed_autograd(kde_backward_op)


def prepare(
    function: str, x: Tensor, refs: Tensor, sigma2: float | Tensor, backend: str | None, points: str = "x"
) -> tuple[Groups, Tensor, Tensor, Tensor, str]:
    """Check the arguments of a kde op and flatten them: (groups, z `[B, N, D]`, refs, sigma2 `[B, N]`, backend)."""
    groups = check_groups(function, **{points: x, "refs": refs})
    variance = as_number_tensor(function, "sigma2", sigma2, like=x)
    queries = groups.per_query("sigma2", variance, x.shape[-2])
    return groups, groups.points(x), groups.points(refs), queries, pick_backend(backend, x.device)


def quotient(shift: Tensor, sigma2: Tensor) -> Tensor:
    """Score of a displacement m(z) - z in the dtype of the displacement: half precision is divided in float32."""
    score = shift / sigma2
    return score if score.dtype == shift.dtype else score.to(shift.dtype)


def kde_score(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Score of a Gaussian kernel density estimate (Eq. 7).

    s(z) = (m(z) - z)/σ² = ∇ log p̂(z), with m(z) = Σ_j w_j(z) r_j and w_j(z) = softmax_j(b_j - |z - r_j|²/2σ²).

    Args:
        x: `[..., N, D]`, the points z.
        refs: `[..., M, D]`, the reference points r; leading dimensions broadcast against those of x.
        sigma2: σ² > 0, the squared bandwidth in squared units of x: a float, or a tensor of shape `[]`, `[...]` (one
            per group) or `[..., N]` (one per query).
        log_weights: b, `[..., M]` or `[M]`, log of the weight of each reference point, up to a constant; -inf for one
            that is absent, None for equal weights.
        exclude_self: whether query n leaves out reference point n; N = M then.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`, in units of 1/x. Differentiable twice in every tensor.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    if log_weights is not None or exclude_self:
        given = _weighted("kde_score", x, refs, sigma2, Weighting(log_weights, exclude_self, are_relative=True))
        shift, _, _ = given.run(backend=backend)
        return given.groups.unflatten(quotient(shift, given.sigma2.unsqueeze(-1)))
    groups, z, refs, variance, name = prepare("kde_score", x, refs, sigma2, backend)
    shift, _, _ = kde_op(z, refs, variance, name, results=("shift",))
    return groups.unflatten(quotient(shift, variance.unsqueeze(-1)))


def kde_mean(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean of the reference points, m(z) = Σ_j w_j(z) r_j: the stable target of denoising score matching.

    Arguments, derivatives and errors are those of `kde_score`. Returns `[..., N, D]`, in units of x.
    """
    if log_weights is not None or exclude_self:
        given = _weighted("kde_mean", x, refs, sigma2, Weighting(log_weights, exclude_self, are_relative=True))
        _, mean, _ = given.run(backend=backend)
        return given.groups.unflatten(mean)
    groups, z, refs, variance, name = prepare("kde_mean", x, refs, sigma2, backend)
    _, mean, _ = kde_op(z, refs, variance, name, results=("mean",))
    return groups.unflatten(mean)


def kde_log_density(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalized log-density, log p̂(z) = log Σ_j π_j exp(-|z - r_j|²/2σ²) - (D/2) log 2πσ², π = softmax(log_weights).

    With `exclude_self`, π is that of the other reference points. Arguments, derivatives and errors are those of
    `kde_score`. Returns `[..., N]`, in nats.
    """
    if log_weights is not None or exclude_self:
        given = _weighted("kde_log_density", x, refs, sigma2, Weighting(log_weights, exclude_self, are_relative=True))
        _, _, log_sum = given.run(backend=backend)
        M, D = refs.shape[-2:]
        logs = given.log_weights
        log_total = math.log(M - exclude_self) if logs is None else _log_total(logs, exclude_self)
        density = log_sum - log_total - 0.5 * D * (math.log(2 * math.pi) + given.sigma2.log())
        return given.groups.unflatten(density.to(x.dtype))
    groups, z, refs, variance, name = prepare("kde_log_density", x, refs, sigma2, backend)
    _, _, log_density = kde_op(z, refs, variance, name, results=("log_density",))
    return groups.unflatten(log_density)


def _weighted(function: str, x: Tensor, refs: Tensor, sigma2: float | Tensor, weighting: Weighting) -> Averaging:
    """Arguments of a density estimate with weights of its reference points."""
    given = Averaging(function, x, refs, sigma2, weighting)
    if given.sigma2.ndim == 3:
        batch = list(given.groups.batch)
        raise ValueError(
            f"{function}: sigma2 must be a number or have one entry per group, shape {batch}, or per query, "
            f"{[*batch, x.shape[-2]]}; kernel_average takes one per reference point"
        )
    return given


def _log_total(log_weights: Tensor, exclude_self: bool) -> Tensor:
    """log Σ_j exp(b_j) `[B, 1]`, or of all others for every reference point `[B, M]`."""
    if not exclude_self:
        return log_weights.logsumexp(-1, keepdim=True)
    # Sums of those before and those after: no difference, which could cancel. A finite number stands for -inf, at which
    # logcumsumexp has no derivative.
    least = torch.finfo(log_weights.dtype).min / 2
    logs, absent = log_weights.clamp_min(least), log_weights.new_full((len(log_weights), 1), least)
    before = torch.cat([absent, logs.logcumsumexp(-1)[:, :-1]], -1)
    after = torch.cat([logs.flip(-1).logcumsumexp(-1)[:, :-1].flip(-1), absent], -1)
    return torch.logaddexp(before, after)
