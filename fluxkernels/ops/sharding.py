"""Kernel averages over reference points that are shared out over processes."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fluxkernels.ops.kernel_average import Average, Weighting


class _Shared(torch.autograd.Function):
    """A tensor that all processes have; its derivative is the sum over what they do with it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """Sum over processes, all of which go on to compute the same."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sharded_kernel_average(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    values: Tensor | None = None,
    *,
    log_weights: Tensor | None = None,
    kernel: str = "gaussian",
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel average over the reference points of all processes, of which each has a part.

    Every process gives the same queries and its own reference points, values and weights, and gets the whole result.
    What travels are N numbers, and then N times the width of the values and one: none depends on the number of
    reference points.

    Args:
        x, sigma2: the same in all processes; sigma2 also one per own reference point, `[..., 1, M]`.
        refs, values, log_weights: the part of this process. Parts may have different sizes. A process whose part has no
            point for a query gives it a log weight of -inf.
        kernel: "gaussian" or "laplace".
        group: the processes; None for all of them.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        Those of `kernel_average`. In a loss that every process computes alike, derivatives in x and in a sigma2 that
        all share are whole in every process, and those in refs, values and log_weights are of its own part.

    Raises:
        RuntimeError: torch.distributed was not started.
        ValueError, TypeError: as for `kernel_average`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sharded_kernel_average: torch.distributed must be started first, by init_process_group")
    queries = _Shared.apply(x, group) if isinstance(x, Tensor) else x
    if isinstance(sigma2, Tensor) and sigma2.ndim < queries.ndim:
        sigma2 = _Shared.apply(sigma2, group)
    weighting = Weighting(log_weights, kernel=kernel, is_part=True)
    own = Average("sharded_kernel_average", queries, refs, sigma2, weighting, values=values, backend=backend)
    average, log_sum = own.groups.unflatten(own.average), own.groups.unflatten(own.log_sum)
    wide = torch.promote_types(average.dtype, torch.float32)
    top = log_sum.detach().to(wide, copy=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    top = torch.where(top == -torch.inf, 0, top)
    weight = (log_sum.to(wide) - top).exp().unsqueeze(-1)
    parts = torch.cat([torch.where(weight > 0, weight * average.to(wide), 0), weight], -1)
    total = _Sum.apply(parts, group)
    sums, whole = total[..., :-1], total[..., -1:]
    return (sums / whole).to(average.dtype), (top + whole.squeeze(-1).log()).to(log_sum.dtype)
