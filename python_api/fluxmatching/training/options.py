"""Settings of a training run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fabric.strategies.strategy import Strategy

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
# Options that may differ between a checkpoint and the run that resumes from it: they change no result on the same
# number of processes.
MAY_CHANGE_ON_RESUME = (
    "iterations", "checkpoint_every", "log_every", "progress", "accelerator", "devices", "num_nodes", "strategy",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of a training run. Construction checks them.

    Attributes:
        iterations: total number of optimizer steps.
        batch_size: samples per minibatch and process, drawn without repetition; every epoch is shuffled anew.
        lr: learning rate after warm-up.
        optimizer: "adam" or "adamw".
        weight_decay: weight decay of the optimizer.
        warmup: iterations over which the learning rate rises linearly from 0.
        ema: decay of the moving average of the parameters, 0 ≤ ema < 1; None for one that begins fast and ends at
            0.999: min(0.999, (1 + n)/(10 + n)) at step n.
        clip: largest norm of the gradient, or None.
        accumulate: minibatches per step, over which the gradient is averaged.
        seed: determines minibatches, the random numbers of the loss, and dropout.
        precision: of Lightning Fabric: "32-true", "bf16-mixed", "16-mixed" or "64-true".
        accelerator: of Lightning Fabric: "auto", "cpu", "cuda", "mps", ...; "cuda:1" is the second GPU.
        devices: processes on this machine, one per device; "auto" takes those that torchrun or Slurm started, or one.
        num_nodes: machines; "auto" takes those of torchrun or Slurm, or one.
        strategy: of Lightning Fabric: "ddp", "fsdp" (FSDP2, parameters sharded over processes) or a `Strategy`
            object; "auto" takes "ddp" for several processes.
        checkpoint_every: iterations between checkpoints; the last iteration always makes one.
        log_every: iterations between rows of metrics.csv.
        progress: whether to show a bar with loss, iterations per second and memory.

    Raises:
        ValueError, TypeError: a value out of its range or of another type; the message names it.
    """

    iterations: int
    batch_size: int = 256
    lr: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 0
    ema: float | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int | str = "auto"
    strategy: str | Strategy = "auto"
    checkpoint_every: int = 1000
    log_every: int = 50
    progress: bool = True

    def __post_init__(self) -> None:
        # A checkpoint can hold Python's numbers only, so NumPy's are converted.
        counts = ("iterations", "batch_size", "accumulate", "checkpoint_every", "log_every")
        processes = [name for name in ("devices", "num_nodes") if getattr(self, name) != "auto"]
        for name in (*counts, "warmup", "seed", *processes):
            self._convert(name, operator.index)
        given = [name for name in ("ema", "clip") if getattr(self, name) is not None]
        for name in ("lr", "weight_decay", *given):
            self._convert(name, float)
        for name in (*counts, *processes):
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
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"TrainingOptions: ema must lie in [0, 1) or be None, got {self.ema}")
        if not isinstance(self.accelerator, str):
            raise TypeError(f"TrainingOptions: accelerator must be a string, got {self.accelerator!r}")
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

    def that_decide_results(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with its checkpoint."""
        names = [field.name for field in fields(self) if field.name not in MAY_CHANGE_ON_RESUME]
        return {name: getattr(self, name) for name in names}
