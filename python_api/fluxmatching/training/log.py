"""Progress bar, metrics.csv and loggers of a training run."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fluxmatching.training.options import TrainingOptions

if TYPE_CHECKING:
    from lightning_fabric import Fabric

COLUMNS = ("iteration", "loss", "iterations_per_second", "lr", "peak_memory_mb")


class Log:
    """Progress of a run: a bar, metrics.csv, and the loggers of the engine.

    The loss of an iteration is read only when a row is written, so that no step waits for a GPU.

    Args:
        options: settings of the run.
        iteration: where the run starts or resumes.
        recent: losses since the last row of metrics.csv; updated in place, since checkpoints keep them.
        folder: where files go; None writes none.
        fabric: the engine, whose first process shows the bar.
    """

    def __init__(
        self, options: TrainingOptions, iteration: int, recent: list[Tensor], folder: Path | None, fabric: Fabric
    ) -> None:
        self.options, self.recent, self.fabric = options, recent, fabric
        hidden = not (options.progress and fabric.is_global_zero)
        self.bar = tqdm(total=options.iterations, initial=iteration, disable=hidden, unit="it", dynamic_ncols=True)
        self.steps, self.since = 0, time.perf_counter()  # since the last row, in this process
        self.file = None if folder is None else _start_table(folder / "metrics.csv", iteration)

    def is_due(self, iteration: int) -> bool:
        """Return whether a row is written after this iteration: every `log_every`, and the last."""
        return iteration % self.options.log_every == 0 or iteration == self.options.iterations

    def write(self, iteration: int, logged: dict[str, Tensor], lr: float) -> None:
        """Record an iteration, and write a row if one is due."""
        self.recent.append(logged["loss"])
        self.steps += 1
        self.bar.update()
        if not self.is_due(iteration):
            return
        now = time.perf_counter()
        row = {
            "loss": mean_of(self.recent),
            "iterations_per_second": self.steps / (now - self.since),
            "lr": lr,
            "peak_memory_mb": _peak_memory(self.fabric.device) / 1e6,
        }
        self.recent.clear()
        self.steps, self.since = 0, now
        self.bar.set_postfix(loss=f"{row['loss']:.4g}", memory=f"{row['peak_memory_mb']:.0f} MB")
        if self.file is not None:
            with self.file.open("a", newline="") as lines:
                csv.writer(lines).writerow([iteration, *row.values()])
        if self.fabric.loggers:
            more = {name: value.float().mean().item() for name, value in logged.items() if name != "loss"}
            self.fabric.log_dict(row | more, step=iteration)

    def close(self) -> None:
        self.bar.close()
        for logger in self.fabric.loggers:
            logger.finalize("success")


def mean_of(losses: list[Tensor]) -> float:
    """Return the mean of numbers `[]` in double precision, with one read from the device."""
    return torch.stack(losses).double().mean().item()


def _start_table(file: Path, iteration: int) -> Path:
    """Create metrics.csv, or drop the rows that the resumed run will write again."""
    kept: list[list[str]] = []
    if file.exists():
        with file.open(newline="") as lines:
            rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS) and row[0].isdigit()]
        kept = [row for row in rows if int(row[0]) <= iteration]
    part = file.with_name("part-metrics.csv")
    with part.open("w", newline="") as lines:
        csv.writer(lines).writerows([COLUMNS, *kept])
    part.replace(file)
    return file


def _peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: of the CUDA allocator, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
