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
        ValueError: another number of processes was started than the options say.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    devices, num_nodes = number_of_processes(options)
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
    _check_number_of_processes(fabric, options)
    return fabric


def number_of_processes(options: TrainingOptions) -> tuple[int, int]:
    """Return (devices, num_nodes) of the options, where "auto" takes those that torchrun or Slurm started, or one.

    Raises:
        ValueError: Slurm does not say how many of several processes are on each machine.
    """
    here, nodes = 1, 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ.get("WORLD_SIZE", here)) // here
    elif (tasks := _slurm_tasks()) > 1 and "auto" in (options.devices, options.num_nodes):
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ValueError(
                f"Trainer: Slurm starts {tasks} processes, and devices='auto' needs the number per machine; use srun "
                f"--nodes and --ntasks-per-node in place of --ntasks"
            )
        here = int(os.environ["SLURM_NTASKS_PER_NODE"])
        nodes = int(os.environ.get("SLURM_NNODES", tasks // here))
    devices = here if options.devices == "auto" else int(options.devices)
    return devices, nodes if options.num_nodes == "auto" else int(options.num_nodes)


def _slurm_tasks() -> int:
    """Return the number of processes that Slurm started, 1 in its interactive shells."""
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if shell else int(os.environ.get("SLURM_NTASKS", "1"))


def _check_number_of_processes(fabric: Fabric, options: TrainingOptions) -> None:
    """Raise ValueError if processes would train alone, or wait for others."""
    started = distributed.is_available() and distributed.is_initialized()
    size = int(os.environ.get("WORLD_SIZE", _slurm_tasks()))
    if (size := distributed.get_world_size() if started else size) != fabric.world_size:
        raise ValueError(
            f"Trainer: {size} processes were started (WORLD_SIZE or SLURM_NTASKS), TrainingOptions("
            f"devices={options.devices!r}, num_nodes={options.num_nodes!r}) asks for {fabric.world_size}"
        )


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
    mesh = mesh["data_parallel"] if mesh.ndim > 1 else mesh
    for part in reversed(list(module.modules())):
        has_forward = not isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if part is not module and has_forward and sum(p.numel() for p in part.parameters()) >= SHARD_UNIT:
            _shard_unit(part, mesh)
    _shard_unit(module, mesh)
    return module


def _shard_unit(module: nn.Module, mesh: Any) -> None:
    """Shard the parameters of a module that no unit inside of it has.

    Raises:
        TypeError: they have several dtypes.
    """
    from torch.distributed.fsdp import fully_shard

    dtypes = {parameter.dtype for parameter in module.parameters() if local(parameter) is parameter}
    if len(dtypes) > 1:
        raise TypeError(
            f"Trainer: strategy 'fsdp' shards parameters of one dtype, got {', '.join(sorted(map(str, dtypes)))}"
        )
    fully_shard(module, mesh=mesh)


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


def layout_of(module: nn.Module) -> dict[str, str]:
    """Return shape and dtype of every parameter and buffer, to compare them between processes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {f"loss.{name}": f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors}


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or a whole tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def share_buffers(module: nn.Module) -> None:
    """Set buffers to those of rank 0, as replicas must be equal: forward may have changed them by its own samples."""
    if buffers := [buffer for buffer in module.buffers() if buffer.numel() and local(buffer) is buffer]:
        # As DistributedDataParallel does: it takes all dtypes and strides.
        distributed._broadcast_coalesced(distributed.group.WORLD, buffers, 2**28, 0)  # type: ignore[attr-defined,arg-type]


def cpu_by_default() -> AbstractContextManager[Any]:
    """Return a context in which PyTorch's own factory calls, such as those of optimizers, use the CPU."""
    # Without a need it is not entered: it slows every call down.
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
