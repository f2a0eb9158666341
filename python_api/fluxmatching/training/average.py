"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """PyTorch's `AveragedModel` with the decay of `get_ema_multi_avg_fn`, updated without waiting for the device.

    PyTorch copies its counter from the CPU to the device at every update, and the host waits for all that the device
    has to do until then. The mean has no use for the counter. With parameters of several dtypes or devices, PyTorch's
    own update runs.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        with torch.device("cpu"):  # of the counter; the parameters stay where they are
            super().__init__(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
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
