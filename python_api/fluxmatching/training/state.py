"""State of a training run: all parameters under their names, however they are wrapped, compiled or sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

# `torch.distributed.checkpoint` is imported where it is used: with SymPy it takes a second, and only training needs it.


def _whole() -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_of_module(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module; parameters that are sharded are gathered on the first process."""
    from torch.distributed.checkpoint import state_dict

    return state_dict.get_model_state_dict(module, options=_whole())


def state_of(loss: nn.Module, average: AveragedModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return the entries of a checkpoint; parameters that are sharded are gathered on the first process."""
    from torch.distributed.checkpoint import state_dict

    return {
        "loss": state_of_module(loss),
        "average": {"parameters": state_of_module(average.module), "updates": int(average.n_averaged)},
        # Before the first step there is none, and PyTorch would make one: of a step that was not taken.
        "optimizer": state_dict.get_optimizer_state_dict(loss, optimizer, options=_whole()) if optimizer.state else {},
    }


def load_state(state: dict[str, Any], loss: nn.Module, average: AveragedModel, optimizer: Optimizer) -> None:
    """Set everything to the entries that `state_of` returned.

    Raises:
        RuntimeError, ValueError, KeyError: they belong to another module.
    """
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(loss, state["loss"], options=options)
    state_dict.set_model_state_dict(average.module, state["average"]["parameters"], options=options)
    average.n_averaged.fill_(state["average"]["updates"])
    if not state["optimizer"]:
        return
    # Parameters that the loss does not use have no state.
    some = state_dict.StateDictOptions(full_state_dict=True, strict=False)
    state_dict.set_optimizer_state_dict(loss, optimizer, state["optimizer"], options=some)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # a list now, which the next checkpoint would hold
