"""Settings of a training run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
# Options that may differ between a checkpoint and the run that resumes from it: length and visibility of the run.
MAY_CHANGE_ON_RESUME = ("iterations", "checkpoint_every", "log_every", "progress", "tensorboard")


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of a training run. Construction checks them.

    Attributes:
        iterations: total number of minibatches.
        batch_size: samples per minibatch and process, drawn without repetition; every epoch is shuffled anew.
        lr: learning rate after warm-up.
        optimizer: "adam" or "adamw".
        weight_decay: weight decay of the optimizer.
        warmup: iterations over which the learning rate rises linearly from 0.
        ema: decay of the moving average of the parameters, 0 ≤ ema < 1.
        clip: largest norm of the gradient, or None.
        precision: "32-true", or "bf16-mixed" for autocast to bfloat16.
        seed: determines minibatches, the random numbers of the loss, and dropout.
        checkpoint_every: iterations between checkpoints; the last iteration always makes one.
        log_every: iterations between rows of metrics.csv.
        progress: whether to show a bar with loss, iterations per second and memory.
        tensorboard: whether to write TensorBoard events beside metrics.csv.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    iterations: int
    batch_size: int = 256
    lr: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 0
    ema: float = 0.999
    clip: float | None = 1.0
    precision: str = "32-true"
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        # A checkpoint can hold Python's numbers only, so NumPy's are converted.
        for name in ("iterations", "batch_size", "warmup", "seed", "checkpoint_every", "log_every"):
            self._convert(name, operator.index)
        for name in ("lr", "weight_decay", "ema", *(() if self.clip is None else ("clip",))):
            self._convert(name, float)
        for name in ("iterations", "batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingOptions: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"TrainingOptions: {name} must be positive and finite, got {getattr(self, name)}")
        if not (self.warmup >= 0 and 0 <= self.weight_decay < float("inf")):
            raise ValueError(
                f"TrainingOptions: warmup and weight_decay must not be negative, got {self.warmup} and "
                f"{self.weight_decay}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"TrainingOptions: ema must lie in [0, 1), got {self.ema}")
        for name, choices in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if (got := getattr(self, name)) not in choices:
                takes = ", ".join(map(repr, choices))
                raise ValueError(f"TrainingOptions: {name} must be one of {takes}, got {got!r}")

    def _convert(self, name: str, kind: Callable[[Any], Any]) -> None:
        try:
            object.__setattr__(self, name, kind(getattr(self, name)))
        except (TypeError, ValueError):
            wanted = "a number" if kind is float else "a whole number"
            raise TypeError(f"TrainingOptions: {name} must be {wanted}, got {getattr(self, name)!r}") from None
