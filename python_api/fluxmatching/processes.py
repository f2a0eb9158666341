"""What several processes of torch.distributed do together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from fluxkernels import philox


def rank_and_size() -> tuple[int, int]:
    """(this process, how many there are); (0, 1) where torch.distributed was not started."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def joined(x: Tensor) -> Tensor:
    """x of all processes, one after the other; all have to have the same shape."""
    _, size = rank_and_size()
    whole = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def shared_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """`seed`, or one that the first process draws for all."""
    key = philox.as_seed(seed, device)
    if seed is None:
        dist.broadcast(key, 0)
    return key


def check_shared(function: str, name: str, value: Tensor) -> None:
    """Raise ValueError in all processes unless all of them have the same value."""
    least, most = value.clone(), value.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise ValueError(
            f"{function}: {name} must be the same in all processes, got values from {least.min().item():.6g} to "
            f"{most.max().item():.6g}; draw it from a seed that they share"
        )


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Make every gradient the mean over processes, in one message; a parameter without one counts as zero."""
    _, size = rank_and_size()
    wanted = [p for p in parameters if p.requires_grad]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in wanted if p.grad is not None])
    dist.all_reduce(flat)
    flat /= size
    for p, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
        p.grad = part.view_as(p)
