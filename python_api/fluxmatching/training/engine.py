"""Lightning Fabric as the engine of `Trainer`: devices, processes, precision, and how a module is distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from fluxmatching.training.options import TrainingOptions

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

# A module of at least as many parameters is sharded, gathered and freed as one unit; smaller ones go with their parent.
SHARD_UNIT = 10_000_000


def make_fabric(options: TrainingOptions, loggers: Sequence[Logger]) -> Fabric:
    """Make and launch the engine.

    Raises:
        ImportError: lightning-fabric is not installed.
        ValueError: torch.distributed runs with another number of processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    everywhere = int(os.environ.get("WORLD_SIZE", "1"))
    devices = here if options.devices == "auto" else int(options.devices)
    num_nodes = everywhere // here if options.num_nodes == "auto" else int(options.num_nodes)
    strategy: Any = options.strategy
    if strategy == "auto" and devices * num_nodes > 1:
        strategy = "ddp"
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=devices * num_nodes, tensor_parallel_size=1)
    accelerator, _, index = options.accelerator.partition(":")
    chosen = [int(index)] if index and accelerator != "cpu" and devices == 1 else devices
    fabric = Fabric(
        accelerator=accelerator, strategy=strategy, devices=chosen, num_nodes=num_nodes,
        precision=options.precision, loggers=list(loggers),  # type: ignore[arg-type]
    )  # fmt: skip
    fabric.launch()
    started = distributed.is_available() and distributed.is_initialized()
    if (size := distributed.get_world_size() if started else 1) != fabric.world_size:
        raise ValueError(
            f"Trainer: torch.distributed runs with {size} processes, TrainingOptions(devices={options.devices!r}, "
            f"num_nodes={options.num_nodes!r}) asks for {fabric.world_size}"
        )
    return fabric


def is_sharded(fabric: Fabric) -> bool:
    """Return whether a process holds only its part of the parameters."""
    from lightning_fabric.strategies.fsdp import FSDPStrategy
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    return isinstance(fabric.strategy, (FSDPStrategy, ModelParallelStrategy))


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module's parameters over processes with FSDP2, large submodules as units of their own."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"] if mesh.ndim > 1 else mesh
    for part in reversed(list(module.modules())):
        has_forward = not isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if part is not module and has_forward and sum(p.numel() for p in part.parameters()) >= SHARD_UNIT:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@torch.no_grad()
def copy_from_first_process(fabric: Fabric, module: nn.Module) -> None:
    """Set parameters and buffers to those of rank 0. DistributedDataParallel does so itself, FSDP2 does not."""
    tensors = [*module.parameters(), *module.buffers()]
    values: list[Tensor] = fabric.broadcast([tensor.detach().cpu() for tensor in tensors])
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def cpu_by_default() -> AbstractContextManager[Any]:
    """Return a context in which PyTorch's own factory calls, such as those of optimizers, use the CPU."""
    # Without a need it is not entered: it slows every call down.
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
