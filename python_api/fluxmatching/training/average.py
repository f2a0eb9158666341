"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAY = 0.999


def average_from_start(means: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
    """Average over about the last tenth of the updates so far, until that is as many as `DECAY` covers.

    With a fixed decay a short training would end with an average that still holds the initial parameters.
    """
    number = int(count)
    torch._foreach_lerp_(list(means), list(current), 1 - min(DECAY, (1 + number) / (10 + number)))


class MovingAverage(AveragedModel):
    """PyTorch's `AveragedModel` with a decay, or None for `average_from_start`, updated without waiting for the device.

    PyTorch copies its counter from the CPU to the device at every update, and the host waits for all that the device
    has to do until then. The mean has no use for the counter. With parameters of several dtypes or devices, PyTorch's
    own update runs.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        update = average_from_start if decay is None else get_ema_multi_avg_fn(decay)
        with torch.device("cpu"):  # of the counter; the parameters stay where they are
            super().__init__(module, multi_avg_fn=update, use_buffers=False)
        kinds = {(p.device, p.dtype) for p in (*module.parameters(), *self.module.parameters())}
        self.is_uniform = len(kinds) == 1

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move toward the parameters of `model`; the first update, and all updates of buffers, copy."""
        if not self.is_uniform:
            super().update_parameters(model)
            return
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        if self.n_averaged:
            assert self.multi_avg_fn is not None
            self.multi_avg_fn(averaged, current, self.n_averaged)
        else:
            for mean, parameter in zip(averaged, current, strict=True):
                mean.copy_(parameter)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1
