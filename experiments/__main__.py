"""The command line: `python -m experiments list | run NAME | report`."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock, Timeout
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from experiments.common.registry import Paused, UsageError, load_experiment, load_experiments
from experiments.common.report import Result, write_report
from experiments.common.run import Run, describe, read_config
from fluxkernels import backends

LOCK = ".lock"  # held while a run writes; the system lets it go when the process ends, however it ends
BACKENDS = ("auto", *backends())
app = SubcommandApp()


@app.command(name="list")
def list_experiments() -> int:
    """Show all experiments."""
    header = ("name", "paper", "presets", "title")
    rows = [(e.name, e.paper, ", ".join(e.presets), e.title) for e in load_experiments().values()]
    print(_aligned([header, *rows]))
    return 0


@app.command
def run(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    preset: Literal["smoke", "small", "gpu", "paper"] = "small",
    backend: Annotated[str, arg(metavar="{auto,torch,cpu,triton}")] = "auto",
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}")] = "auto",
    seed: int = 0,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    restart: FlagCreatePairsOff[bool] = False,
    quiet: FlagCreatePairsOff[bool] = False,
    overrides: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = (),
) -> int:
    """Run one experiment. The same command again resumes an interrupted run.

    Args:
        name: which experiment; `list` shows them
        preset: seconds, minutes on two cores, minutes on a GPU (some experiments), or the paper's settings
        backend: how the ops are computed; auto takes the fastest that works here
        device: where tensors go; auto takes cuda if there is one
        seed: all random numbers follow from it
        out: folder for all results; by default runs/NAME-PRESET
        restart: delete the run in that folder first
        quiet: no progress bars
        overrides: fields of the preset to change
    """
    experiment = load_experiment(name)
    config = experiment.configure(preset, [text for group in overrides for text in group])
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    asked = None if backend == "auto" else backend
    place = _device(device)
    folder = Path("runs") / f"{name}-{preset}" if out is None else out
    try:
        with warnings.catch_warnings(record=True) as notes:
            description = describe(experiment, preset, config, asked, place, seed)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--backend {backend} on {place}: {error}") from error
    for note in notes:  # why the automatic choice is not the fast one: a line, not a warning with its code
        print(f"note: {note.message}", file=sys.stderr)

    with ExitStack() as held:
        held_already = read_config(folder) is not None
        if held_already:
            held.enter_context(locked(folder))  # before a --restart deletes anything
        state = prepare_folder(folder, description, restart)
        if state == "finished":
            print(f"{folder} is finished: see {folder / 'summary.md'}. To run it again, add --restart.")
            return 0
        if not held_already:
            held.enter_context(locked(folder))
        # What an experiment draws without a generator of its own, such as initial weights, is repeatable too.
        torch.manual_seed(seed)
        job = Run(experiment, preset, config, asked, place, seed, folder, progress=not quiet)
        if state == "resume":
            print(f"resuming {folder}, {len(job.rows())} rows done")
        try:
            experiment.run(job)
        finally:
            job.save_seconds()
        if not (folder / "summary.md").exists():
            raise RuntimeError(f"{name} ended without Run.summary")
        _show(job)
    return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be.

    Raises:
        UsageError: another run is in it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another run is writing to {folder}; wait for it, or give another --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


@app.command
def report(runs: Path = Path("runs"), out: Annotated[Path | None, arg(metavar="FILE")] = None) -> int:
    """Gather all runs into one HTML page.

    Args:
        runs: folder below which the runs lie
        out: the page; by default report.html in that folder
    """
    page = runs / "report.html" if out is None else out
    try:
        finished, unfinished = write_report(runs, page)
    except OSError as error:
        raise UsageError(f"cannot write {page}: {error.strerror}") from error
    print(f"{page}: {finished} finished, {unfinished} unfinished")
    return 0


def prepare_folder(out: Path, description: dict[str, Any], restart: bool) -> str:
    """Decide what a run of this description may do in the folder `out`; `restart` first deletes one there.

    Returns:
        "new", "resume" (the same run began there) or "finished" (and ended there).

    Raises:
        UsageError: the folder holds other files than a run's, or another run and `restart` is not set.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out")
    # The temporary file alone is what a kill in the first instant leaves.
    if not out.exists() or {path.name for path in out.iterdir()} <= {"config.json.tmp", LOCK}:
        return "new"
    found = read_config(out)
    if found is None:
        raise UsageError(f"{out} is not empty and holds no config.json of a run; choose another --out")
    if restart:
        _remove_run(out)
        return "new"
    there, here = _identity(found), _identity(description)
    differ = [
        f"{key} {there.get(key, 'absent')} there, {here.get(key, 'absent')} now"
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key)
    ]
    if differ:
        ways = "give another folder with --out, or delete that run with --restart"
        raise UsageError(f"{out} holds a different run ({'; '.join(differ)}); {ways}")
    return "finished" if (out / "summary.md").exists() else "resume"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, by default that of the process.

    Returns:
        The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if args is None else list(args)
    try:
        status: int = app.cli(prog="python -m experiments", description="The experiments of Flux Matching.", args=words)
        return status
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Paused as pause:
        print(f"paused: {pause}; run the same command to go on")
        return 0
    except KeyboardInterrupt:
        without = " without --restart" if "--restart" in words else ""
        print(f"\ninterrupted; run the same command{without} to resume", file=sys.stderr)
        return 130


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a name may be well formed, and the device absent
    except (RuntimeError, AssertionError):
        raise UsageError(f"no device {name!r} here; take auto, cpu, cuda or cuda:N") from None
    return device


def _identity(description: dict[str, Any]) -> dict[str, str]:
    """The entries in which two parts of one run must agree."""
    entries = {key: description[key] for key in ("experiment", "preset", "seed")}
    entries["backend"] = description["backend"]["resolved"]
    entries["device"] = torch.device(description["device"]).type
    entries |= {f"config.{key}": value for key, value in description["config"].items()}
    return {key: json.dumps(value) for key, value in entries.items()}  # as text, so that nan equals nan


def _remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else. config.json goes last, so that a kill can be repeated."""
    for folder in ("figures", "models"):
        if (out / folder).is_dir():
            shutil.rmtree(out / folder)
    for name in ("summary.md", "checkpoint.pt", "metrics.csv", "config.json"):
        (out / f"{name}.tmp").unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)


def _show(job: Run) -> None:
    header = ("quantity", "paper", "ours", "holds")
    print(_aligned([header, *((r.quantity, r.paper, r.ours, r.holds) for r in job.results)]))
    missed: list[Result] = [result for result in job.results if result.holds == "NO"]
    for result in missed:
        print(f"NOT REPRODUCED: {result.quantity}: ours {result.ours}, paper {result.paper}")
    for path in (job.out / "summary.md", *job.figures):
        print(path)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
