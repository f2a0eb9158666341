"""Summary of a finished run, as data for summary.json and as text for summary.md."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from experiments.common.registry import Experiment
from experiments.common.results import HOLDS, Figure, Result, duration

SOURCE = "Flux Matching (Pao-Huang, Qiu, Ermon 2026)"
RESULT_COLUMNS = ("quantity", "paper", "ours", "holds")
_HERE = Path(__file__).parent


def list_results(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results as summary.json has them; "holds" is true, false, or null if only reported."""
    return [
        {
            "quantity": result.quantity,
            "paper": result.paper,
            "ours": result.ours,
            "holds": None if result.passed is None else bool(result.passed),
        }
        for result in results
    ]


def list_figures(figures: Sequence[Figure], out: Path) -> list[dict[str, str]]:
    """Return the figures as summary.json has them, their paths relative to the run's folder `out`.

    Raises:
        ValueError: a figure lies outside `out`.
    """
    return [{"path": figure.path.relative_to(out).as_posix(), "caption": figure.caption} for figure in figures]


def command(experiment: Experiment, config: Any, description: dict[str, Any]) -> str:
    """Return the command that repeats the run. The folder is left out: it may name a private place."""
    preset = description["preset"]
    words = ["python", "-m", "experiments", "run", experiment.name, "--preset", preset]
    words += ["--backend", description["backend"]["resolved"]]
    words += ["--device", torch.device(description["device"]).type, "--seed", str(description["seed"])]
    return shlex.join([*words, *experiment.overrides(preset, config)])


def entries(description: dict[str, Any], seconds: float) -> dict[str, str]:
    """Return the origin of the run: settings, time, memory, versions and commit.

    Args:
        description: the run's settings, as `run.describe` gives them.
        seconds: time spent on the run.
    """
    device = torch.device(description["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    made = {
        "experiment": description["experiment"],
        "preset": description["preset"],
        "backend": description["backend"]["resolved"],
        "device": f"{device} ({name})",
        "seed": str(description["seed"]),
        "duration": duration(seconds),
        "peak memory": peak_memory(device),
        "versions": ", ".join(f"{package} {version}" for package, version in description["versions"].items()),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    commit = _commit()
    return made | {"commit": commit} if commit else made


def markdown(summary: dict[str, Any]) -> str:
    """Return the text of summary.md for the content of summary.json."""
    lines = [f"# {summary['title']}", "", summary["claim"], "", f"{SOURCE}, {summary['paper']}.", ""]
    results = [[row["quantity"], row["paper"], row["ours"], HOLDS[row["holds"]]] for row in summary["results"]]
    lines += table(RESULT_COLUMNS, results)
    for figure in summary["figures"]:
        lines += ["", f"![{Path(figure['path']).stem}]({figure['path']})"]
        lines += ["", figure["caption"]] if figure["caption"] else []
    if summary["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in summary["notes"])]
    lines += ["", "## How it was made", "", "```", summary["command"], "```", ""]
    lines += table(("entry", "value"), [list(item) for item in summary["entries"].items()])
    return "\n".join(lines) + "\n"


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process and the GPU have held so far, as "1.2 GB, on the GPU 30.0 GB"."""
    try:
        import resource
    except ImportError:  # Windows
        found = "unknown"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
    if device.type != "cuda":
        return found
    return f"{found}, on the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells]]


def _commit() -> str | None:
    """Return the checkout's git commit, marked if files were changed; None without git or a commit."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=_HERE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
