"""What a training run shows and keeps of its progress."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from fluxmatching.training import Trainer

COLUMNS = ("iteration", "loss", "iterations_per_second", "lr", "peak_memory_mb")


class Log:
    """Progress bar, metrics.csv and TensorBoard of a run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, options = trainer, trainer.options
        hidden = not options.progress or trainer.rank > 0
        self.bar = tqdm(
            total=options.iterations, initial=trainer.iteration, disable=hidden, unit="it", dynamic_ncols=True
        )
        self.steps, self.since = 0, time.perf_counter()  # since the last line, in this process
        self.file = None if trainer.folder is None or trainer.rank > 0 else self._table(trainer.folder / "metrics.csv")
        self.board = self._board() if options.tensorboard and trainer.rank == 0 else None

    def _table(self, file: Path) -> Path:
        """metrics.csv without the lines that the resumed run will write again."""
        kept: list[list[str]] = []
        if file.exists():
            with file.open(newline="") as lines:
                rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS) and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) <= self.trainer.iteration]
        part = file.with_name("part-metrics.csv")
        with part.open("w", newline="") as lines:
            csv.writer(lines).writerows([COLUMNS, *kept])
        part.replace(file)
        return file

    def _board(self) -> Any:
        if self.trainer.folder is None:
            raise ValueError("Trainer: tensorboard needs a folder")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TrainingOptions(tensorboard=True) needs tensorboard: pip install tensorboard") from error
        return SummaryWriter(self.trainer.folder, purge_step=self.trainer.iteration)

    def write(self, loss: float) -> None:
        trainer = self.trainer
        trainer.recent.append(loss)
        self.steps += 1
        self.bar.update()
        if trainer.iteration % trainer.options.log_every and trainer.iteration < trainer.options.iterations:
            return
        mean, now = sum(trainer.recent) / len(trainer.recent), time.perf_counter()
        row = {
            "loss": mean,
            "iterations_per_second": self.steps / (now - self.since),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "peak_memory_mb": _peak_memory(trainer.device) / 1e6,
        }
        trainer.recent, self.steps, self.since = [], 0, now
        self.bar.set_postfix(loss=f"{mean:.4g}", memory=f"{row['peak_memory_mb']:.0f} MB")
        if self.file is not None:
            with self.file.open("a", newline="") as lines:
                csv.writer(lines).writerow([trainer.iteration, *row.values()])
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, trainer.iteration)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the CUDA allocator, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
