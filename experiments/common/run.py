"""A run and its folder: settings, metrics, figures, checkpoint and summary, all safe against a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.common import summary as summaries
from experiments.common.registry import Experiment
from experiments.common.results import Figure, Result
from fluxkernels import __version__, resolve_backend

# All that a run writes; `metrics.jsonl` before the checkpoint, `summary.json` at the very end.
FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "summary.md", "summary.json")
FOLDERS = ("figures", "models")

Value = None | bool | int | float | str


@dataclass
class Run:
    """Settings, random numbers, metrics and files of one run, as an experiment uses them.

    Making a `Run` makes its folder. A folder that holds an earlier part of the same run is continued; the command
    line checks beforehand that it is the same run.

    Args:
        experiment: the experiment that is run.
        preset: "smoke", "small", "gpu" or "paper".
        config: the preset's dataclass, overrides applied.
        backend: for the `backend=` argument of every op; None takes the fastest that works.
        device: device of all tensors.
        seed: all random numbers follow from it, through `generator`.
        out: folder of everything the run writes.
        progress: if True, progress bars are shown.
        read_only: if True, config.json stays as it is, which may be of another device.
    """

    experiment: Experiment
    preset: str
    config: Any
    backend: str | None
    device: torch.device
    seed: int
    out: Path
    progress: bool = True
    read_only: bool = False
    results: tuple[Result, ...] = field(default=(), init=False)
    figures: list[Path] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._description = describe(self.experiment, self.preset, self.config, self.backend, self.device, self.seed)
        self._metrics = self.out / "metrics.jsonl"
        self._began = time.monotonic()
        earlier = read_config(self.out)
        self._seconds_before = 0.0 if earlier is None else float(earlier["seconds"])
        self._drop_cut_line()
        self._save_config()

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, the parts before an interruption included."""
        return self._seconds_before + time.monotonic() - self._began

    def bar(self, iterable_or_total: Iterable[Any] | int, desc: str) -> tqdm[Any]:
        """Show a progress bar on stderr over an iterable, or over a number of steps that `.update()` counts."""
        # In a log file a line now and then is enough.
        often = 0.1 if sys.stderr.isatty() else 10.0
        options: dict[str, Any] = {"desc": desc, "disable": not self.progress, "mininterval": often}
        if isinstance(iterable_or_total, int):
            return tqdm(total=iterable_or_total, **options)
        return tqdm(iterable_or_total, **options)

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, oldest first; with `kind`, only the rows of that kind."""
        if not self._metrics.exists():
            return []
        with self._metrics.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [row for row in rows if kind is None or row.get("kind") == kind]

    def log(self, **row: Any) -> None:
        """Append one row to metrics.jsonl, at once. By convention the entry `kind` names the kind of row.

        Values are None, bools, numbers (nan and inf too), text, or 0-d tensors and arrays.

        Raises:
            TypeError: a value is none of these.
        """
        line = json.dumps({name: _value(name, value) for name, value in row.items()}, ensure_ascii=False)
        # One short write: a kill can cut the line, which the next start drops, but never mix two lines.
        with self._metrics.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{line}\n")
        self._save_config()

    def by_seed(self, kind: str, column: str, **known: Any) -> list[Any]:
        """Return the values in one column, in the order of the seeds, from rows of that kind with the entries `known`.

        Rows without a value in the column are left out.
        """
        rows = [row for row in self.rows(kind) if known.items() <= row.items()]
        rows = [row for row in rows if row.get(column) is not None]
        return [row[column] for row in sorted(rows, key=lambda row: row["seed"])]

    def figure(self, name: str) -> Path:
        """Return the path of the figure `name`, `out/figures/<name>.png`, and make its folder."""
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
        """Return the last saved state, its tensors on the CPU (`load_state_dict` moves them), or None."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def generator(self, *key: int | str) -> torch.Generator:
        """Return a CPU generator whose numbers depend on the seed and `key` alone, not on what was drawn before.

        With the step in the key, resumed work draws the same numbers as uninterrupted work.

        Raises:
            TypeError: a part of the key is neither an integer nor text.
        """
        parts = [part if isinstance(part, str) else operator.index(part) for part in (self.seed, *key)]
        digest = hashlib.sha256(repr(parts).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def device_generator(self, *key: int | str) -> torch.Generator:
        """Return such a generator of the run's device; devices draw different numbers from one seed."""
        return torch.Generator(self.device).manual_seed(self.generator(*key).initial_seed())

    @contextmanager
    def drawing(self, *key: int | str) -> Iterator[None]:
        """Seed torch's own CPU generator like `generator(*key)` inside, for initial weights; restore it afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator(*key).initial_seed())
            yield

    def summary(self, results: Sequence[Result], figures: Sequence[Figure], notes: Sequence[str] = ()) -> None:
        """Write summary.md and then summary.json, which marks the run as finished.

        Figures made by `figure` but not in `figures` come last, without a caption.

        Raises:
            ValueError: a figure lies outside the run's folder.
        """
        self.results = tuple(results)
        captioned = {figure.path for figure in figures}
        shown = [*figures, *(Figure(path, "") for path in self.figures if path not in captioned)]
        self.figures = [figure.path for figure in shown]
        self._save_config()
        content = {
            "title": self.experiment.title,
            "claim": self.experiment.claim,
            "paper": self.experiment.paper,
            "results": summaries.list_results(results),
            "figures": summaries.list_figures(shown, self.out),
            "notes": list(notes),
            "command": summaries.command(self.experiment, self.config, self._description),
            "entries": summaries.entries(self._description, self.seconds),
        }
        _replace(self.out / "summary.md", summaries.markdown(content))
        _replace(self.out / "summary.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def save_seconds(self) -> None:
        """Write the time spent so far at the end of a part of the run; `log` and `save_state` write it too."""
        self._save_config()

    def _save_config(self) -> None:
        if self.read_only:
            return
        described = self._description | {"seconds": round(self.seconds, 3)}
        _replace(self.out / "config.json", json.dumps(described, indent=2) + "\n")

    def _drop_cut_line(self) -> None:
        """Drop a last line that a kill cut short."""
        if self._metrics.exists():
            os.truncate(self._metrics, self._metrics.read_bytes().rfind(b"\n") + 1)


def describe(
    experiment: Experiment, preset: str, config: Any, backend: str | None, device: torch.device, seed: int
) -> dict[str, Any]:
    """Return the content of config.json, apart from the time spent.

    Raises:
        ValueError, RuntimeError: from `resolve_backend`, when the backend cannot be used here.
    """
    description = {
        "experiment": experiment.name,
        "preset": preset,
        "config": dataclasses.asdict(config),
        "backend": {"requested": backend or "auto", "resolved": resolve_backend(backend, device)},
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
    """Read a run's config.json; None if there is none or it is of some other program."""
    try:
        found = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    wanted = {"experiment", "preset", "config", "backend", "device", "seed", "seconds"}
    return found if isinstance(found, dict) and wanted <= set(found) else None


def is_finished(out: Path) -> bool:
    """Check whether the run in the folder `out` wrote its summary."""
    return (out / "summary.json").exists()


def _value(name: str, value: Any) -> Value:
    if getattr(value, "ndim", None) == 0:  # a tensor, an array or one of numpy's numbers
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: cannot log a {type(value).__name__}; takes numbers, bools, text, None")


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
