"""The command line: `python -m experiments list | run NAME | report | export RUN`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    from tyro.conf import Positional, arg
    from tyro.extras import SubcommandApp
except ImportError as error:
    raise SystemExit("error: the experiments need more packages: pip install -e '.[experiments]'") from error

from experiments.common.export import export_example
from experiments.common.folder import locked, prepare_folder
from experiments.common.options import PROGRAM, Options, WithoutConfig, read_options
from experiments.common.registry import Paused, UsageError, load_experiment, load_experiments
from experiments.common.report import write_report
from experiments.common.run import Run, describe, is_finished, read_config
from fluxkernels import backends

BACKENDS = ("auto", *backends())
app = SubcommandApp()


@app.command(name="list")
def list_experiments() -> int:
    """Show all experiments."""
    header = ("name", "paper", "presets", "title")
    rows = [(e.name, e.paper, ", ".join(e.presets), e.title) for e in load_experiments()]
    print(_aligned([header, *rows]))
    return 0


# For the list of commands alone: `main` reads the words after "run", since their types depend on the experiment.
app.command(name="run")(WithoutConfig)


def run(options: Options[Any]) -> int:
    """Run one experiment, or resume it."""
    experiment = load_experiment(options.name)
    if options.backend not in BACKENDS:
        raise UsageError(f"no backend {options.backend!r}; there are {', '.join(BACKENDS)}")
    backend = None if options.backend == "auto" else options.backend
    device = _device(options.device)
    settings = (experiment, options.preset, options.config, backend, device, options.seed)
    folder = Path("runs") / f"{options.name}-{options.preset}" if options.out is None else options.out
    try:
        with warnings.catch_warnings(record=True) as notes:
            description = describe(*settings)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--backend {options.backend} on {device}: {error}") from error
    for note in notes:  # why the automatic choice is not the fast one: a line, not a warning with its code
        print(f"note: {note.message}", file=sys.stderr)

    with ExitStack() as held:
        held_already = read_config(folder) is not None
        if held_already:
            held.enter_context(locked(folder))  # before a --restart deletes anything
        state = prepare_folder(folder, description, options.restart)
        if state == "finished":
            print(f"{folder} is finished: see {folder / 'summary.md'}. To run it again, add --restart.")
            return 0
        if not held_already:
            held.enter_context(locked(folder))
        # What an experiment draws without a generator of its own, such as initial weights, is repeatable too.
        torch.manual_seed(options.seed)
        job = Run(*settings, folder, progress=not options.quiet)
        if state == "resume":
            print(f"resuming {folder}, {len(job.rows())} rows done")
        try:
            experiment.main(job)
        finally:
            job.save_seconds()
        if not is_finished(folder):
            raise RuntimeError(f"{options.name} ended without Run.summary")
        _show(job)
    return 0


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


@app.command
def export(run: Positional[Path], out: Annotated[Path, arg(metavar="DIR")] = Path("examples")) -> int:
    """Write the trained field of a finished run as an example of fluxmatching.load_example.

    Args:
        run: folder of the run
        out: folder of examples, in which the example gets a folder of its own
    """
    with locked(run) if run.is_dir() else nullcontext():
        place = export_example(run, out)
    for path in sorted(place.iterdir()):
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, by default that of the process.

    Returns:
        The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words[:1] == ["run"]:
            return run(read_options(words[1:]))
        status: int = app.cli(prog=PROGRAM, description="The experiments of Flux Matching.", args=words)
        return status
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Paused as pause:
        print(f"paused: {pause}; run the same command to continue")
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


def _show(job: Run) -> None:
    header = ("quantity", "paper", "ours", "holds")
    print(_aligned([header, *((r.quantity, r.paper, r.ours, r.holds) for r in job.results)]))
    for result in (result for result in job.results if result.holds == "NO"):
        print(f"NOT REPRODUCED: {result.quantity}: ours {result.ours}, paper {result.paper}")
    for path in (job.out / "summary.md", *job.figures):
        print(path)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
