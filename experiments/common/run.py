"""A run and its folder: settings, metrics, figures, checkpoint and summary, all safe against a kill."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import operator
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.common.registry import Experiment
from experiments.common.report import Figure, Result, spread, summary_text
from fluxkernels import __version__, resolve_backend

__all__ = ["Figure", "Result", "Run", "describe", "read_config", "spread"]

_INT = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|-?inf")


@dataclass
class Run:
    """Everything an experiment needs from its surroundings.

    Making a `Run` makes its folder; a folder that holds an earlier part of the same run is continued;
    the command line checks beforehand that it is the same run.

    Args:
        experiment: what is run.
        preset: "smoke", "small", "gpu" or "paper".
        config: the preset's dataclass, overrides applied.
        backend: for the `backend=` argument of every op; None chooses by itself.
        device: where tensors go.
        seed: all random numbers follow from it, through `generator`.
        out: folder of everything the run writes.
        progress: whether progress bars are shown.
    """

    experiment: Experiment
    preset: str
    config: Any
    backend: str | None
    device: torch.device
    seed: int
    out: Path
    progress: bool = True
    results: tuple[Result, ...] = field(default=(), init=False)
    figures: list[Path] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._description = describe(self.experiment, self.preset, self.config, self.backend, self.device, self.seed)
        self._metrics = self.out / "metrics.csv"
        self._began = time.monotonic()
        earlier = read_config(self.out)
        self._seconds_before = 0.0 if earlier is None else float(earlier["seconds"])
        self._columns = self._repair_metrics()
        self._save_config()

    @property
    def seconds(self) -> float:
        """Time spent on this run in seconds, the parts before an interruption included."""
        return self._seconds_before + time.monotonic() - self._began

    def bar(self, iterable_or_total: Iterable[Any] | int, desc: str) -> tqdm[Any]:
        """A progress bar on stderr over an iterable, or over a number of steps told with `.update()`."""
        # A log file wants a line now and then, not ten a second.
        often = 0.1 if sys.stderr.isatty() else 10.0
        options: dict[str, Any] = {"desc": desc, "disable": not self.progress, "mininterval": often}
        if isinstance(iterable_or_total, int):
            return tqdm(total=iterable_or_total, **options)
        return tqdm(iterable_or_total, **options)

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The metrics rows on disk, oldest first, only those whose column `kind` is `kind` if that is given.

        Text that reads as a number comes back as int or float. Cells that were None or not given are absent.
        """
        if not self._metrics.exists():
            return []
        with self._metrics.open(newline="", encoding="utf-8") as file:
            rows = [{k: _parse(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        return [row for row in rows if kind is None or row.get("kind") == kind]

    def log(self, **row: Any) -> None:
        """Append one row to metrics.csv, at once. By convention a column `kind` tells sorts of rows apart.

        Values are numbers, bools (written as 1 and 0), text of one line, None, or 0-d tensors and arrays.

        Raises:
            TypeError: a value is none of these.
            ValueError: a text has a line break.
        """
        cells = {name: _cell(name, value) for name, value in row.items()}
        new = [name for name in cells if name not in self._columns]
        if new:
            self._add_columns(new)
        # One short write: a kill can cut the line, which the next start drops, but never mix two lines.
        with self._metrics.open("a", newline="", encoding="utf-8") as file:
            file.write(_csv([[cells.get(name, "") for name in self._columns]]))
        self._save_config()

    def by_seed(self, kind: str, column: str, **known: Any) -> list[Any]:
        """A column of the rows of that kind whose other columns are as `known` says, in the order of their seeds."""
        rows = [row for row in self.rows(kind) if known.items() <= row.items()]
        return [row[column] for row in sorted(rows, key=lambda row: row["seed"]) if column in row]

    def figure(self, name: str) -> Path:
        """Where to save the figure `name`: `out/figures/<name>.png`, its folder made."""
        path = self.out / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        if path not in self.figures:
            self.figures.append(path)
        return path

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by `state`: tensors, numbers, text, and lists, tuples and dicts of those."""
        temporary = self.out / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")
        self._save_config()

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state, its tensors on the CPU (`load_state_dict` moves them), or None."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def generator(self, *key: int | str) -> torch.Generator:
        """A CPU generator whose numbers depend on the seed and `key` alone, not on what was drawn before.

        With the step in the key, resumed work draws the same numbers as uninterrupted work.

        Raises:
            TypeError: a part of the key is neither an integer nor text.
        """
        parts = [part if isinstance(part, str) else operator.index(part) for part in (self.seed, *key)]
        digest = hashlib.sha256(repr(parts).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def device_generator(self, *key: int | str) -> torch.Generator:
        """The same for noise that is made on the run's device; devices draw different numbers from one seed."""
        return torch.Generator(self.device).manual_seed(self.generator(*key).initial_seed())

    @contextmanager
    def drawing(self, *key: int | str) -> Iterator[None]:
        """Inside, torch's own generator of the CPU is `generator(*key)`, for initial weights; afterwards as before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator(*key).initial_seed())
            yield

    def summary(self, results: Sequence[Result], figures: Sequence[Figure], notes: Sequence[str] = ()) -> None:
        """Write summary.md, which marks the run as finished.

        Figures made by `figure` but not in `figures` come last, without a caption.

        Raises:
            ValueError: a figure lies outside the run's folder.
        """
        self.results = tuple(results)
        captioned = {figure.path for figure in figures}
        shown = [*figures, *(Figure(path, "") for path in self.figures if path not in captioned)]
        self.figures = [figure.path for figure in shown]
        self._save_config()
        text = summary_text(
            self.experiment, self.config, self._description, self.seconds, self.out, results, shown, notes
        )
        _replace(self.out / "summary.md", text)

    def save_seconds(self) -> None:
        """Keep the time spent so far, which else is kept with every row: for the end of a part of the run."""
        self._save_config()

    def _save_config(self) -> None:
        described = self._description | {"seconds": round(self.seconds, 3)}
        _replace(self.out / "config.json", json.dumps(described, indent=2) + "\n")

    def _repair_metrics(self) -> list[str]:
        """Drop a last line that a kill cut short; returns the columns."""
        if not self._metrics.exists():
            return []
        data = self._metrics.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self._metrics, whole)
        return next(csv.reader([data[:whole].decode().partition("\n")[0]]), [])

    def _add_columns(self, new: Sequence[str]) -> None:
        """Rewrite the file with a longer header; old rows leave the new cells empty."""
        columns = [*self._columns, *new]
        rows: list[list[str]] = []
        if self._columns:
            with self._metrics.open(newline="", encoding="utf-8") as file:
                rows = [row + [""] * len(new) for row in csv.reader(file)][1:]
        _replace(self._metrics, _csv([columns, *rows]))
        self._columns = columns


def describe(
    experiment: Experiment, preset: str, config: Any, backend: str | None, device: torch.device, seed: int
) -> dict[str, Any]:
    """What config.json says of a run, apart from the time spent.

    Raises:
        ValueError, RuntimeError: from `resolve_backend`, when the backend cannot be used here.
    """
    description = {
        "experiment": experiment.name,
        "preset": preset,
        "config": dataclasses.asdict(config),
        "backend": {"asked": backend or "auto", "resolved": resolve_backend(backend, device)},
        "device": str(device),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fluxkernels": __version__,
        },
    }
    # As it reads back from the file: tuples become lists.
    read_back: dict[str, Any] = json.loads(json.dumps(description))
    return read_back


def read_config(out: Path) -> dict[str, Any] | None:
    """A run's config.json, or None where there is none or it is some other program's."""
    try:
        found = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    wanted = {"experiment", "preset", "config", "backend", "device", "seed", "seconds"}
    return found if isinstance(found, dict) and wanted <= set(found) else None


def _cell(name: str, value: Any) -> str:
    if getattr(value, "ndim", None) == 0:  # a tensor, an array or one of numpy's numbers
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return repr(value)
    if not isinstance(value, str):
        raise TypeError(f"{name}: cannot log a {type(value).__name__}; takes numbers, text, None")
    if "\n" in value or "\r" in value:
        raise ValueError(f"{name}: cannot log text with a line break: {value!r}")
    return value


def _parse(text: str) -> int | float | str:
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
