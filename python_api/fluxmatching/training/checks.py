"""Checks of what `Trainer` is given, before anything is started."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.weight_norm import WeightNorm

from fluxmatching.training.checkpoint import check_readable, not_kept
from fluxmatching.training.options import TrainingOptions
from fluxmatching.training.state import state_of_module


def check_arguments(loss: Any, options: Any) -> None:
    """Raise TypeError or ValueError unless loss and options are what `Trainer` takes."""
    if not isinstance(loss, nn.Module):
        raise TypeError(f"Trainer: loss must be a torch.nn.Module, got {type(loss).__name__}")
    if not isinstance(options, TrainingOptions):
        raise TypeError(f"Trainer: options must be TrainingOptions, got {type(options).__name__}")
    for name, tensor in [*loss.named_parameters(), *loss.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"Trainer: loss must be initialized, {name} is lazy; call the loss once on a minibatch")
        if tensor.is_meta:
            raise ValueError(f"Trainer: loss must have values, {name} is on meta; its to_empty(device=...) makes some")
    for name, module in loss.named_modules():
        if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
            raise TypeError(
                f"Trainer: {name or 'loss'} has torch.nn.utils.weight_norm, which cannot be copied for the moving "
                f"average; use torch.nn.utils.parametrizations.weight_norm"
            )
    if not any(p.requires_grad for p in loss.parameters()):
        raise ValueError(f"Trainer: loss must have parameters that need a gradient, got {type(loss).__name__}")
    if not _takes_keyword(loss, "seed"):
        raise TypeError(
            f"Trainer: loss must take forward(x, seed=...), such as NoiseAnnealedFluxMatching(field); "
            f"{type(loss).__name__} does not"
        )


def check_takes_labels(loss: nn.Module) -> None:
    """Raise TypeError unless forward of the loss takes the labels of the data."""
    if not _takes_keyword(loss, "labels"):
        raise TypeError(
            f"Trainer: data have labels, which the loss must take as forward(x, labels=..., seed=...), such as "
            f"FlowMatching; {type(loss).__name__} does not"
        )


def _takes_keyword(loss: nn.Module, name: str) -> bool:
    parameters = inspect.signature(loss.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_state(loss: nn.Module, options: TrainingOptions) -> None:
    """Raise TypeError unless a checkpoint can hold the state of the loss and of the options."""
    try:
        state = state_of_module(loss)
    except Exception as error:  # whatever get_extra_state and PyTorch raise
        raise not_kept("loss", error) from error
    check_readable({"loss": state, "options": options.that_decide_results()})
