"""Lightning Fabric as the engine of `Trainer`: devices, processes, precision, and how a module is distributed."""

from __future__ import annotations

import copy
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
    from lightning_fabric.plugins.precision.amp import MixedPrecision

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
    strategy: Any = copy.deepcopy(options.strategy)  # an object serves one engine
    if strategy == "auto" and devices * num_nodes > 1:
        strategy = "ddp"
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=devices * num_nodes, tensor_parallel_size=1)
    accelerator, _, index = options.accelerator.partition(":")
    chosen = [int(index)] if index and accelerator != "cpu" and devices == 1 else devices
    on_cuda = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    precision: dict[str, Any] = {"precision": options.precision}
    if options.precision.endswith("-mixed"):
        precision = {"plugins": [mixed_precision(options.precision, "cuda" if on_cuda else "cpu")]}
    fabric = Fabric(
        accelerator=accelerator, strategy=strategy, devices=chosen, num_nodes=num_nodes, loggers=list(loggers),
        **precision,
    )  # fmt: skip
    fabric.launch()
    started = distributed.is_available() and distributed.is_initialized()
    if (size := distributed.get_world_size() if started else 1) != fabric.world_size:
        raise ValueError(
            f"Trainer: torch.distributed runs with {size} processes, TrainingOptions(devices={options.devices!r}, "
            f"num_nodes={options.num_nodes!r}) asks for {fabric.world_size}"
        )
    return fabric


def mixed_precision(precision: str, device: str) -> MixedPrecision:
    """Make Fabric's mixed precision without its rounding of the data.

    Fabric converts what a module receives to half precision. A minibatch is no activation: rounded to three digits it
    is another one at small σ. The network still computes in half precision.

    Args:
        precision: "bf16-mixed" or "16-mixed".
        device: "cuda" or "cpu".

    Returns:
        A plugin, for `Fabric(plugins=[...])`.
    """
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    class MixedPrecisionOfNetworks(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    return MixedPrecisionOfNetworks(precision, device)  # type: ignore[arg-type]


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
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if any(step == 0 < size - 1 for size, step in zip(buffer.shape, buffer.stride(), strict=True)):
                setattr(
                    part, name, buffer.clone(memory_format=torch.contiguous_format)
                )  # expanded: nothing can be copied into it
    tensors = [*module.parameters(), *module.buffers()]
    values: list[Tensor] = fabric.broadcast([tensor.detach().cpu() for tensor in tensors])
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def cpu_by_default() -> AbstractContextManager[Any]:
    """Return a context in which PyTorch's own factory calls, such as those of optimizers, use the CPU."""
    # Without a need it is not entered: it slows every call down.
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
