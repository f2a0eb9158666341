"""Progress bar, metrics.csv and TensorBoard events of a training run."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fluxmatching.training.options import TrainingOptions

COLUMNS = ("iteration", "loss", "iterations_per_second", "lr", "peak_memory_mb")


class Log:
    """Progress of a run: a bar, metrics.csv, and TensorBoard events.

    Args:
        options: settings of the run.
        iteration: where the run starts or resumes.
        recent: losses since the last row of metrics.csv; updated in place, since checkpoints keep them.
        folder: where files go; None writes none.
        device: device of the model, for its peak memory.
        shown: whether this process may show a bar.
    """

    def __init__(
        self,
        options: TrainingOptions,
        iteration: int,
        recent: list[float],
        folder: Path | None,
        device: torch.device,
        *,
        shown: bool,
    ) -> None:
        self.options, self.recent, self.device = options, recent, device
        hidden = not (options.progress and shown)
        self.bar = tqdm(total=options.iterations, initial=iteration, disable=hidden, unit="it", dynamic_ncols=True)
        self.steps, self.since = 0, time.perf_counter()  # since the last row, in this process
        self.file = None if folder is None else _start_table(folder / "metrics.csv", iteration)
        self.board = _start_board(folder, iteration) if options.tensorboard and shown else None

    def write(self, iteration: int, loss: float, lr: float) -> None:
        """Record the loss of an iteration; write a row every `log_every` iterations and after the last one."""
        self.recent.append(loss)
        self.steps += 1
        self.bar.update()
        if iteration % self.options.log_every and iteration < self.options.iterations:
            return
        mean, now = sum(self.recent) / len(self.recent), time.perf_counter()
        row = {
            "loss": mean,
            "iterations_per_second": self.steps / (now - self.since),
            "lr": lr,
            "peak_memory_mb": _peak_memory(self.device) / 1e6,
        }
        self.recent.clear()
        self.steps, self.since = 0, now
        self.bar.set_postfix(loss=f"{mean:.4g}", memory=f"{row['peak_memory_mb']:.0f} MB")
        if self.file is not None:
            with self.file.open("a", newline="") as lines:
                csv.writer(lines).writerow([iteration, *row.values()])
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


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


def _start_board(folder: Path | None, iteration: int) -> Any:
    if folder is None:
        raise ValueError("Trainer: tensorboard needs a folder")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TrainingOptions(tensorboard=True) needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=iteration)


def _peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: of the CUDA allocator, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
