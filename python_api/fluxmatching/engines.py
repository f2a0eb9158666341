"""Networks that a training engine has wrapped: how a loss calls what is inside.

A loss evaluates the field several times per step, most of them for derivatives in the samples. An engine's wrapper
counts every call: it prepares an exchange of gradients, or asks for its own backward pass. So inner evaluations call
the network inside of the wrapper, and one evaluation, whose backward pass trains, calls the wrapper. Wrapping a loss
module instead of the field avoids the question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fluxmatching.field_modules import networks_of, reachable_from

_COUNTING = (DistributedDataParallel, DataParallel)
_ADVICE = "wrap the loss module in place of the field, such as FluxMatching(field, sigma)"


def without_engine(function: str, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what inner evaluations call in place of the field.

    Raises:
        TypeError: a wrapper that counts calls is hidden inside a function; it cannot be avoided there.
    """
    if isinstance(field, _COUNTING):
        network: nn.Module = field.module
        return network
    if _is_fabric_module(field):
        return _InPrecision(field)
    for network in networks_of(field):
        for module in network.modules():
            static = isinstance(module, DistributedDataParallel) and module.static_graph
            if static or _is_fabric_module(module):
                kind = "DistributedDataParallel(static_graph=True)" if static else "a module of Fabric"
                raise TypeError(
                    f"{function}: field is a function that calls {kind}, which does not allow several evaluations per "
                    f"step; {_ADVICE}, or pass the wrapped network itself as field"
                )
    return field


def network_inside(field: object) -> object:
    """Return what `torch.compile`, DistributedDataParallel and DataParallel have wrapped, or the field itself."""
    while (inner := getattr(field, "module" if isinstance(field, _COUNTING) else "_orig_mod", None)) is not None:
        field = inner
    return field


def check_differentiable_twice(function: str, field: Callable[..., Tensor], method: str) -> None:
    """Raise RuntimeError if the method differentiates a sharded network twice, which FSDP does not support."""
    if method not in ("double_backward", "forward_over_reverse"):
        return
    if any(_is_sharded(module) for network in networks_of(field) for module in network.modules()):
        raise RuntimeError(
            f"{function}: second_derivatives={method!r} does not work on a network whose parameters FSDP shards; "
            f"use second_derivatives='finite_difference' or 'closed_form'"
        )


def is_in_half_precision(field: Callable[..., Tensor]) -> bool:
    """Return whether an engine has a network inside a callable compute in bfloat16 or float16."""
    for thing in reachable_from(field):
        if isinstance(thing, _InPrecision) and "16" in str(getattr(thing.precision, "precision", "")):
            return True
        # Accelerate replaces the method forward of a network by one under autocast.
        if isinstance(thing, nn.Module) and any("_original_forward" in vars(module) for module in thing.modules()):
            return True
    return False


def _is_sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, (FSDPModule, FullyShardedDataParallel))


def _is_fabric_module(module: object) -> bool:
    # By name: Fabric comes as lightning_fabric and as lightning.fabric, and neither needs to be installed.
    return any(kind.__name__ == "_FabricModule" for kind in type(module).__mro__)


class _InPrecision:
    """A Fabric module's network, called in the precision that Fabric gives it."""

    def __init__(self, wrapper: Any) -> None:
        self.network: nn.Module = wrapper.module
        self.precision = wrapper._strategy.precision

    def __call__(self, *args: Tensor) -> Tensor:
        with self.precision.forward_context():
            result: Tensor = self.precision.convert_output(self.network(*self.precision.convert_input(args)))
        return result
