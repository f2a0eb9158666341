"""Collectives of torch.distributed that the losses and the trainer need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from fluxkernels import philox


def rank_and_size() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) where torch.distributed was not started."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def all_gather_samples(x: Tensor) -> Tensor:
    """Concatenate x of all processes in the order of their ranks; all must have the same shape."""
    _, size = rank_and_size()
    whole = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def shared_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return `seed`, or one that the first process draws for all."""
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
    """Replace every gradient by its mean over processes, in one message; a missing gradient counts as zero."""
    _, size = rank_and_size()
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    dist.all_reduce(flat)
    flat /= size
    for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.grad = part.view_as(p)


class JointMinibatch:
    """The minibatches of all processes taken as one, or the minibatch of this process alone.

    Every process runs the density estimate on all samples, which is cheap. The network is expensive, so each process
    differentiates it at its own share of the endpoints.

    Args:
        gather_across_ranks: whether to join the minibatches; without torch.distributed there is only one.
    """

    def __init__(self, gather_across_ranks: bool) -> None:
        self.rank, self.size = rank_and_size() if gather_across_ranks else (0, 1)

    def join(
        self, function: str, x: Tensor, sigma: Tensor, seed: int | Tensor | None
    ) -> tuple[Tensor, int | Tensor | None]:
        """Return the joint minibatch and a seed that all processes share.

        Raises:
            ValueError: sigma differs between processes.
        """
        if self.size == 1:
            return x, seed
        check_shared(function, "sigma", sigma)
        return all_gather_samples(x), shared_seed(seed, x.device)

    def own_endpoints(self, x: Tensor, endpoints: Tensor | None) -> Tensor | None:
        """Return the indices of `endpoints` (None: of all samples of x) that this process differentiates; None: all."""
        if self.size == 1:
            return endpoints
        return (torch.arange(len(x), device=x.device) if endpoints is None else endpoints)[self.rank :: self.size]

    def sum(self, t: Tensor) -> Tensor:
        """Sum t over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def own_samples(self, t: Tensor) -> Tensor:
        """Return the rows of this process's own minibatch."""
        return t if self.size == 1 else t.tensor_split(self.size)[self.rank]
