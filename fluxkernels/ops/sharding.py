"""Kernel averages over reference points that are shared out over processes."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fluxkernels.ops.kernel_average import Averaging, Weighting


class _Shared(torch.autograd.Function):
    """A tensor that all processes have; its derivative is the sum over what they do with it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over processes, all of which go on to compute the same."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Shared.apply(gradient, ctx.group), None


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

    Every process passes the same queries and its own reference points, values and weights; the whole result is returned
    in each. N numbers are exchanged, and then N times the width of the values and one, whatever the number of reference
    points. It does not run under `torch.func`.

    Args:
        x, sigma2: the same in all processes; sigma2 also one per own reference point, `[..., 1, M]`.
        refs, values, log_weights: the part of this process. Parts may have different sizes. A process whose part has no
            point for a query sets its log weights to -inf.
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
    weighting = Weighting(log_weights, kernel=kernel, is_part=True)
    own = Averaging("sharded_kernel_average", x, refs, sigma2, weighting)
    own.z = _Shared.apply(own.z, group)
    if own.sigma2.ndim == 2:  # else it belongs to the reference points of this process
        own.sigma2 = _Shared.apply(own.sigma2, group)
    _, average, log_sum = (own.groups.unflatten(t) for t in own.run(values, backend=backend))
    wide = torch.promote_types(average.dtype, torch.float32)
    top = log_sum.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    top = torch.where(top == -torch.inf, 0, top)
    weight = (log_sum - top).exp().unsqueeze(-1)
    # Masked before the product: NaN times a weight of 0 would be NaN, in derivatives too.
    masked = torch.where(log_sum.unsqueeze(-1) > -torch.inf, average.to(wide), 0)
    total = _Sum.apply(torch.cat([weight * masked, weight], -1), group)
    sums, whole = total[..., :-1], total[..., -1:]
    return (sums / whole).to(average.dtype), top + whole.squeeze(-1).log()
