"""State of a training run: all parameters under their names, however they are wrapped, compiled or sharded."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_of(loss: nn.Module, average: AveragedModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return the entries of a checkpoint; parameters that are sharded are gathered on the first process."""
    return {
        "loss": get_model_state_dict(loss, options=WHOLE),
        "average": {
            "parameters": get_model_state_dict(average.module, options=WHOLE),
            "updates": int(average.n_averaged),
        },
        "optimizer": get_optimizer_state_dict(loss, optimizer, options=WHOLE),
    }


def load_state(state: dict[str, Any], loss: nn.Module, average: AveragedModel, optimizer: Optimizer) -> None:
    """Set everything to the entries that `state_of` returned.

    Raises:
        RuntimeError, ValueError, KeyError: they belong to another module.
    """
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(loss, state["loss"], options=options)
    set_model_state_dict(average.module, state["average"]["parameters"], options=options)
    average.n_averaged.fill_(state["average"]["updates"])
    set_optimizer_state_dict(loss, optimizer, state["optimizer"], options=options)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # a list now, which the next checkpoint would hold
