"""Collectives of torch.distributed that the method itself needs; engines average gradients."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from fluxkernels import philox
from fluxkernels.checks import can_check_values


def rank_and_size() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) where torch.distributed was not started."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def all_gather_samples(function: str, x: Tensor, name: str = "x") -> Tensor:
    """Concatenate x, the argument called `name`, of all processes in the order of their ranks.

    Raises:
        ValueError: in every process, before any data travel, if shapes or dtypes differ between processes.
    """
    _, size = rank_and_size()
    _check_same_layout(function, name, x)
    whole = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
_MAX_DIMENSIONS = 16


def _check_same_layout(function: str, name: str, x: Tensor) -> None:
    """Compare shapes and dtypes on the host, so that no GPU waits."""
    own = [_DTYPES.index(x.dtype), x.ndim, *x.shape, *[0] * (_MAX_DIMENSIONS - x.ndim)]
    mine = torch.tensor(own, dtype=torch.int64, device="cpu")
    layouts = [torch.empty_like(mine) for _ in range(rank_and_size()[1])]
    dist.all_gather(layouts, mine, group=_host_group())
    if any(not torch.equal(layout, mine) for layout in layouts):
        found = "; ".join(
            f"rank {rank} {row[2 : 2 + row[1]]} {_DTYPES[row[0]]}"
            for rank, row in enumerate(layout.tolist() for layout in layouts)
        )
        raise ValueError(f"{function}: {name} must have the same shape and dtype in all processes, got {found}")


# By the default group, which is not kept alive: a group that outlives destroy_process_group ends in the middle of exit.
_host_groups: WeakKeyDictionary[object, dist.ProcessGroup] = WeakKeyDictionary()


def _host_group() -> dist.ProcessGroup | None:
    """Return a group that sends CPU tensors: the default one (None) if it can."""
    if dist.get_backend() == "gloo" or "cpu:" in str(dist.get_backend_config()):
        return None
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]


def shared_seed(function: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return `seed`, or one that the first process draws for all.

    Raises:
        ValueError: the seed differs between processes.
    """
    key = philox.as_seed(seed, device)
    if seed is None:
        dist.broadcast(key, 0)
    else:
        check_shared(function, "seed", key if isinstance(seed, Tensor) else philox.as_seed(seed, torch.device("cpu")))
    return key


def rank_seed(key: Tensor, rank: int) -> Tensor:
    """Return the seed of a process that draws its own numbers from a shared one; rank 0 keeps it."""
    # Odd and large, so that seeds of processes do not meet those of other iterations.
    step = rank * 0x9E3779B97F4A7C15 % 2**64
    return key + (step - 2**64 if step >= 2**63 else step)


def check_shared(function: str, name: str, value: Tensor, advice: str = "") -> None:
    """Raise ValueError in all processes unless all of them have the same value; not checked on an accelerator."""
    if not can_check_values(value):
        return
    _check_same_layout(function, name, value)
    every = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(rank_and_size()[1])]
    dist.all_gather(every, value.contiguous(), group=_host_group())
    values = torch.stack(every)
    if not (values == value).all():
        raise ValueError(
            f"{function}: {name} must be the same in all processes, got values from {values.min().item():.6g} to "
            f"{values.max().item():.6g}{advice}"
        )


def check_same_options(function: str, options: dict[str, Any]) -> None:
    """Raise ValueError in all processes, with the names of what differs, unless all of them have the same options."""
    every: list[dict[str, Any]] = [{} for _ in range(rank_and_size()[1])]
    dist.all_gather_object(every, options, group=_host_group())
    for rank, other in enumerate(every):
        names = [name for name in {**every[0], **other} if every[0].get(name) != other.get(name)]
        if names:
            found = "; ".join(f"{name} {every[0].get(name)} and {other.get(name)}" for name in names[:5])
            raise ValueError(
                f"{function}: processes 0 and {rank} must have the same options, data and loss, got {found}"
            )


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
            ValueError: sigma or seed differs between processes.
        """
        if self.size == 1:
            return x, seed
        samples = all_gather_samples(function, x)
        check_shared(function, "sigma", sigma, "; draw it from a seed that they share")
        return samples, shared_seed(function, seed, x.device)

    def check_refs(self, function: str, refs: Tensor | None) -> None:
        """Raise ValueError if the shapes or the sums of the reference points differ between processes."""
        if self.size > 1 and refs is not None:
            _check_same_layout(function, "refs", refs)
            check_shared(function, "the sum of refs", refs.detach().sum(dtype=torch.float64).nan_to_num())

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
