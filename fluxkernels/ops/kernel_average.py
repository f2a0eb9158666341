"""Averages of values under a kernel, with weights of the reference points, and the log of the sum that divides them."""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.checks import (
    Groups,
    as_number_tensor,
    can_check_values,
    check_choice,
    check_finite,
    check_groups,
    check_points,
    check_tensor,
    pick_backend,
    shape_of,
)
from fluxkernels.ops.registration import Op, register_recomputed_autograd

KERNELS = "gaussian", "laplace"


def _fake(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, D = z.shape
    shift, width = (D, D) if values is None else (0, values.shape[-1])
    wide = torch.promote_types(z.dtype, torch.float32)
    return z.new_empty((B, N, shift)), z.new_empty((B, N, width)), z.new_empty((B, N), dtype=wide)


def _backward_fake(
    g_shift: Tensor,
    g_average: Tensor,
    g_log_sum: Tensor,
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    backend: str,
) -> tuple[Tensor, ...]:
    always = (t.new_empty(t.shape) for t in (z, refs, sigma2))
    return *always, *(refs.new_empty(0) if t is None else t.new_empty(t.shape) for t in (values, log_weights))


_ARGUMENTS = (
    "Tensor z, Tensor refs, Tensor sigma2, Tensor? values, Tensor? log_weights, bool exclude_self, str kernel, "
    "str backend"
)
kernel_average_op = Op("kernel_average", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fake)
kernel_average_backward_op = Op(
    "kernel_average_backward",
    f"(Tensor g_shift, Tensor g_average, Tensor g_log_sum, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.exclude_self, ctx.kernel, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.kinds = [(t.shape, t.dtype) for t in output]


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    # A result that the call left out has no cotangent.
    filled = (
        tensors[0].new_zeros(shape, dtype=dtype) if g is None else g
        for g, (shape, dtype) in zip(cotangents, ctx.kinds, strict=True)
    )
    found = kernel_average_backward_op(*filled, *tensors, ctx.exclude_self, ctx.kernel, ctx.backend)
    gradients = (None if t is None else g for t, g in zip(tensors, found, strict=True))
    return *gradients, None, None, None


kernel_average_op.register_autograd(_backward, setup_context=_setup_context)
# Every backend computes second derivatives in the same plain PyTorch.
register_recomputed_autograd(kernel_average_backward_op)


class Weighting(NamedTuple):
    """Changes of the weights of the reference points, as users give them.

    With `is_part` the reference points are one part of all, and queries may have none there. With `are_relative` only
    the ratios of weights count: large log weights would take digits from the log-sum.
    """

    log_weights: Tensor | None = None
    exclude_self: bool = False
    kernel: str = "gaussian"
    is_part: bool = False
    are_relative: bool = False


class Averaging:
    """Arguments of a kernel average as users give them, checked and flattened into B groups.

    Attributes:
        groups: the leading dimensions of the user's tensors.
        z, refs: `[B, N, D]` and `[B, M, D]`.
        sigma2: `[B, N]` or `[B, 1, M]`.
        log_weights: `[B, M]` or None.
        exclude_self, kernel: as given.
    """

    def __init__(self, function: str, x: Tensor, refs: Tensor, sigma2: float | Tensor, weighting: Weighting) -> None:
        log_weights, exclude_self, self.kernel, is_part, are_relative = weighting
        check_choice(function, "kernel", self.kernel, KERNELS)
        self.groups = groups = check_groups(function, x=x, refs=refs)
        N, M = x.shape[-2], refs.shape[-2]
        self.sigma2 = _flat_variance(groups, as_number_tensor(function, "sigma2", sigma2, like=x), N, M)
        _check_exclusion(function, exclude_self, N, M)
        self.exclude_self = exclude_self
        self.log_weights = None if log_weights is None else _flat_log_weights(groups, log_weights, x, M)
        if self.log_weights is not None:
            _check_present(function, self.log_weights, 0 if is_part else 1 + self.exclude_self)
            if are_relative:
                top = self.log_weights.detach().amax(-1, keepdim=True)
                self.log_weights = self.log_weights - torch.where(top.isfinite(), top, 0)
        self.z, self.refs = groups.points(x), groups.points(refs)

    def run(self, values: Tensor | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return shift, average and log-sum in groups, as `fluxkernels.implementation` has them."""
        flat = None if values is None else _flat_values(self.groups, values, self.z, self.refs.shape[1])
        weights = self.log_weights, self.exclude_self, self.kernel
        name = pick_backend(backend, self.z.device)
        found: tuple[Tensor, Tensor, Tensor] = kernel_average_op(self.z, self.refs, self.sigma2, flat, *weights, name)
        return found


def _flat_variance(groups: Groups, variance: Tensor, N: int, M: int) -> Tensor:
    """`[B, N]`, or `[B, 1, M]` where there is one number per reference point."""
    leading = len(groups.batch)
    try:
        if variance.ndim == leading + 2 and variance.shape[-2:] == (1, M):
            return variance.expand(*groups.batch, 1, M).reshape(-1, 1, M)
        if variance.ndim <= leading + 1:
            return groups.per_query("sigma2", variance, N)
    except (RuntimeError, ValueError):
        pass
    batch = list(groups.batch)
    raise ValueError(
        f"{groups.function}: sigma2 must be a number or have one entry per group, shape {batch}, per query, "
        f"{[*batch, N]}, or per reference point, {[*batch, 1, M]}, got {shape_of(variance)}"
    )


def _check_exclusion(function: str, exclude_self: object, N: int, M: int) -> None:
    """Raise an error unless query n can leave out reference point n."""
    if not isinstance(exclude_self, bool):
        raise TypeError(f"{function}: exclude_self must be True or False, got {type(exclude_self).__name__}")
    if not exclude_self:
        return
    if N != M:
        raise ValueError(
            f"{function}: exclude_self must be False unless x and refs have equally many points, got {N} and {M}"
        )
    if M == 1:
        raise ValueError(f"{function}: exclude_self must be False with one reference point, which would leave none")


def _flat_values(groups: Groups, values: Tensor, x: Tensor, M: int) -> Tensor:
    """`[B, M, V]`"""
    check_points(groups.function, "values", values, like=x)
    check_finite(groups.function, values=values)
    try:
        if values.shape[-2] == M:
            return groups.points(values)
    except RuntimeError:
        pass
    raise ValueError(
        f"{groups.function}: values must have shape {[*groups.batch, M]} + [V], one row for each reference point, "
        f"got {shape_of(values)}"
    )


def _flat_log_weights(groups: Groups, log_weights: object, x: Tensor, M: int) -> Tensor:
    """`[B, M]` in float32 or wider."""
    function = groups.function
    logs = check_tensor(function, "log_weights", log_weights)
    if logs.device != x.device:
        raise ValueError(f"{function}: log_weights must be on {x.device} like the first argument, got {logs.device}")
    try:
        if logs.ndim and logs.shape[-1] == M:
            logs = logs.to(torch.promote_types(x.dtype, torch.float32))
            return logs.expand(*groups.batch, M).reshape(-1, M)
    except RuntimeError:
        pass
    takes = f"{[*groups.batch, M]} or {[M]}" if groups.batch else f"{[M]}"
    raise ValueError(
        f"{function}: log_weights must have shape {takes}, one for each reference point, got {shape_of(logs)}"
    )


def _check_present(function: str, log_weights: Tensor, needed: int) -> None:
    """Raise ValueError where a group has fewer reference points than needed, or a weight is no number."""
    if not can_check_values(log_weights):
        return
    logs = log_weights.detach()
    if not bool((logs < torch.inf).all()):  # false for NaN too
        raise ValueError(f"{function}: log_weights must be numbers or -inf, got NaN or +inf")
    fewest = int((logs > -torch.inf).sum(-1).min())
    if fewest < needed:
        own = " beside its own, for exclude_self" if needed > 1 else ""
        raise ValueError(
            f"{function}: log_weights must leave each query a reference point above -inf{own}, got {fewest} in a group"
        )


def kernel_average(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    values: Tensor | None = None,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool = False,
    kernel: str = "gaussian",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Average of values of reference points, weighted by a kernel, and the log of the sum of the weights.

    With b_j = log_weights, the weights are w_j(z) = softmax_j(b_j + log k(z, r_j)), and the results are Σ_j w_j v_j and
    log Σ_j exp(b_j) k(z, r_j). The kernel is k = exp(-|z - r|²/2σ²), or exp(-|z - r|/σ) for "laplace".

    Results for parts of the reference points add up exactly: see `merge_averages`.

    Args:
        x: `[..., N, D]`, the points z.
        refs: `[..., M, D]`, the reference points r; leading dimensions broadcast against those of x.
        sigma2: σ² > 0, the squared bandwidth in squared units of x: a float, or a tensor of shape `[]`, `[...]` (one
            per group), `[..., N]` (one per query) or `[..., 1, M]` (one per reference point).
        values: `[..., M, V]`, what is averaged; None for the reference points.
        log_weights: `[..., M]` or `[M]`, log of the weight of each reference point; -inf for one that is absent.
        exclude_self: whether query n leaves out reference point n; N = M then.
        kernel: "gaussian" or "laplace".
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        (`[..., N, V]`; `[..., N]`, in float32 for half precision). Differentiable twice in every tensor. The derivative
        of |z - r| at 0 is 0. Where values are checked, that is for CPU tensors outside of `torch.compile` and
        `torch.func`, log weights that leave a query no reference point are refused. Elsewhere its average is NaN and
        its log-sum -inf, and results are undefined for weights that are NaN or +inf and for sigma2 ≤ 0.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    given = Averaging("kernel_average", x, refs, sigma2, Weighting(log_weights, exclude_self, kernel))
    _, average, log_sum = given.run(values, backend=backend)
    return given.groups.unflatten(average), given.groups.unflatten(log_sum)


def merge_averages(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Average and log-sum over all reference points, from those over disjoint parts of them.

    With log-sums L_k the log-sum is L = log Σ_k exp(L_k), and the average Σ_k exp(L_k - L) average_k. So reference
    points that do not fit in memory can be taken piece by piece. A merged weight is right to the rounding of L_k.

    Args:
        parts: results of `kernel_average`, (`[..., N, V]`, `[..., N]`), for the same queries. A part in which a query
            has no reference point, with a log-sum of -inf, counts for nothing; on a CPU, where `kernel_average` refuses
            such a part, leave it out.

    Returns:
        (`[..., N, V]`, `[..., N]`), differentiable in all parts.

    Raises:
        ValueError: there is no part, or shapes differ.
    """
    try:
        averages, log_sums = zip(*parts, strict=True)
    except (TypeError, ValueError):
        averages, log_sums = (), ()
    if not all(isinstance(t, Tensor) for t in (*averages, *log_sums)):
        averages = ()
    if not averages:
        raise ValueError("merge_averages: parts must be a list of one or more pairs (average, log-sum)")
    shapes = {(tuple(average.shape), tuple(log_sum.shape)) for average, log_sum in parts}
    if len(shapes) > 1 or averages[0].shape[:-1] != log_sums[0].shape:
        found = ", ".join(f"{shape_of(average)} and {shape_of(log_sum)}" for average, log_sum in parts)
        raise ValueError(f"merge_averages: parts must be pairs [..., N, V] and [..., N] of one shape, got {found}")
    stacked = torch.stack(log_sums)
    present = stacked > -torch.inf
    # Masked before the products: NaN times a weight of 0 would be NaN, in derivatives too.
    weights = torch.where(present.any(0), stacked, 0).softmax(0)
    masked = torch.where(present.unsqueeze(-1), torch.stack(averages), 0)
    average = (weights.unsqueeze(-1) * masked).sum(0).to(averages[0].dtype)
    return torch.where(present.any(0).unsqueeze(-1), average, torch.nan), stacked.logsumexp(0)
