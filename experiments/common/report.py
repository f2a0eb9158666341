"""How results are shown: summary.md of one run, and one HTML page of all runs.

The page is made from the summaries alone, so that summaries somebody else published can be gathered as well.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import markdown
import torch

from experiments.common.registry import Experiment, UsageError

_HERE = Path(__file__).parent
_HOLDS = {True: "yes", False: "NO", None: ""}
_OVERVIEW = ("experiment", "preset", "backend", "holds", "duration", "date")

_CSS = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --paper: #fff; --line: #d5d9de; --soft: #f4f6f8; --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde2e8; --paper: #15181c; --line: #383e46; --soft: #1f242a; --link: #56b4e9 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
a { color: var(--link) }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left }
th, pre { background: var(--soft) }
pre { padding: .6rem; overflow-x: auto }
img { max-width: 100%; background: #fff; border-radius: 4px }
section { border-top: 1px solid var(--line); margin-top: 2.5rem }
"""


@dataclass(frozen=True)
class Result:
    """One line of a run's table.

    Args:
        quantity: what was measured.
        ours: the value measured here, as text.
        paper: the paper's value, as text.
        passed: whether the claim holds; None where the value is only reported.
    """

    quantity: str
    ours: str
    paper: str = "–"
    passed: bool | None = None

    @property
    def holds(self) -> str:
        """The word of the table's last column, empty where the value is only reported."""
        return _HOLDS[None if self.passed is None else bool(self.passed)]


@dataclass(frozen=True)
class Figure:
    """A figure in the run's folder, and the sentence below it."""

    path: Path
    caption: str


def spread(values: Sequence[float], digits: str = ".3f") -> str:
    """Mean, and standard deviation where there are several values, both formatted by `digits`."""
    mean = f"{statistics.mean(values):{digits}}"
    alone = len(values) == 1 or not all(map(math.isfinite, values))
    return mean if alone else f"{mean} ± {statistics.stdev(values):{digits.removeprefix('+')}}"


def summary_text(
    experiment: Experiment,
    config: Any,
    description: dict[str, Any],
    seconds: float,
    out: Path,
    results: Sequence[Result],
    figures: Sequence[Figure],
    notes: Sequence[str],
) -> str:
    """The text of summary.md.

    Args:
        description: the run's settings, as `run.describe` gives them.
        seconds: time spent on the run.
        out: the run's folder, to which the figures' paths are made relative.

    Raises:
        ValueError: a figure lies outside `out`.
    """
    lines = [f"# {experiment.title}", "", experiment.claim, ""]
    lines += [f"Flux Matching (Pao-Huang, Qiu, Ermon 2026), {experiment.paper}.", ""]
    lines += _table(
        ["quantity", "paper", "ours", "holds"],
        [[result.quantity, result.paper, result.ours, result.holds] for result in results],
    )
    for figure in figures:
        path = figure.path.relative_to(out).as_posix()
        lines += ["", f"![{figure.path.stem}]({path})"]
        lines += ["", figure.caption] if figure.caption else []
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    lines += ["", "## How it was made", "", "```", _command(experiment, config, description), "```", ""]
    device = torch.device(description["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    made = {
        "experiment": experiment.name,
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
    if commit:
        made["commit"] = commit
    lines += _table(["entry", "value"], [list(item) for item in made.items()])
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """A length of time as people say it, such as "42 s", "3 min 20 s" or "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, and of the GPU, such as "1.2 GB, on the GPU 30.0 GB"."""
    try:
        import resource
    except ImportError:  # Windows
        found = "unknown"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
    return (
        f"{found}, on the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
        if device.type == "cuda"
        else found
    )


def write_report(runs: Path, page: Path) -> tuple[int, int]:
    """Gather all runs below the folder `runs` into one HTML page that needs no other file.

    Returns:
        The numbers of finished and of unfinished runs on the page.

    Raises:
        UsageError: there is no run below `runs`.
    """
    finished = sorted(path.parent for path in runs.rglob("summary.md"))
    unfinished = sorted({path.parent for path in runs.rglob("config.json")} - set(finished))
    begun = [cells for folder in unfinished if (cells := _begun(folder, runs))]
    if not finished and not begun:
        raise UsageError(f"no runs below {runs}; make one with `python -m experiments run NAME`")
    sections: list[str] = []
    overview: list[list[str]] = []
    contents: list[str] = []
    for number, folder in enumerate(finished):
        text = (folder / "summary.md").read_text(encoding="utf-8")
        entries = _entries(text)
        link = f'<a href="#run{number}">{{}}</a>'
        overview.append([html.escape(entries.get(name, "")) for name in _OVERVIEW])
        overview[-1][0] = link.format(overview[-1][0] or html.escape(folder.name))
        title = re.search(r"^# (.+)$", text, re.M)
        name = html.escape(folder.relative_to(runs).as_posix())
        heading = link.format(html.escape(title[1]) if title else name)
        contents.append(f"<li>{heading} <small>{name}</small></li>")
        sections.append(f'<section id="run{number}">\n{_body(text, folder)}\n</section>')
    parts = ["<h1>Flux Matching: experiments</h1>", "<h2>Overview</h2>", _html_table(_OVERVIEW, overview)]
    if begun:
        parts += ["<h2>Unfinished</h2>", _html_table(("folder", "experiment", "preset", "backend"), begun)]
    parts += ["<h2>Contents</h2>", f"<ul>{''.join(contents)}</ul>", *sections]
    page.parent.mkdir(parents=True, exist_ok=True)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>Flux Matching: experiments</title>'
        f"<style>{_CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return len(finished), len(begun)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells]]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _command(experiment: Experiment, config: Any, description: dict[str, Any]) -> str:
    """The command that repeats the run. The folder is left out: it may name a private place."""
    preset = description["preset"]
    words = ["python", "-m", "experiments", "run", experiment.name, "--preset", preset]
    words += ["--backend", description["backend"]["resolved"]]
    words += ["--device", torch.device(description["device"]).type, "--seed", str(description["seed"])]
    overrides = experiment.overrides(preset, config)
    return shlex.join([*words, "--set", *overrides] if overrides else words)


def _commit() -> str | None:
    """The checkout's git commit, marked where files were changed; None without git or a commit."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row in a markdown text."""
    for line in text.splitlines():
        if line.startswith("| ") and line.endswith(" |"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _entries(text: str) -> dict[str, str]:
    """The last table of a summary by its keys, and under "holds" how many of its checked results hold."""
    rows = list(_rows(text))
    entries = {row[0]: row[1].replace("\\|", "|") for row in rows if len(row) == 2}
    verdicts = [row[3] for row in rows if len(row) == 4]
    yes = verdicts.count("yes")
    return entries | {"holds": f"{yes}/{yes + verdicts.count('NO')}"}


def _begun(folder: Path, runs: Path) -> list[str] | None:
    """What the page says of an unfinished run; None for a config.json of some other program."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cells = [found["experiment"], found["preset"], found["backend"]["resolved"]]
    except (KeyError, TypeError, ValueError):
        return None
    return [html.escape(str(cell)) for cell in (folder.relative_to(runs).as_posix(), *cells)]


def _body(text: str, folder: Path) -> str:
    """A summary as HTML, headings one level lower, figures inside."""

    def embed(found: re.Match[str]) -> str:
        path = folder / html.unescape(found[2])
        if not path.is_file():
            return f'{found[1]}src="data:,"'  # its alternative text is shown instead
        return f'{found[1]}src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    renderer = markdown.Markdown(extensions=["tables", "fenced_code"])
    # A summary's "<" is a sign, never HTML: not from us, and all the less from somebody else.
    renderer.preprocessors.deregister("html_block")
    renderer.inlinePatterns.deregister("html")
    body = renderer.convert(text)
    body = re.sub(r"<(/?)h([1-5])>", lambda found: f"<{found[1]}h{int(found[2]) + 1}>", body)
    return re.sub(r'(<img [^>]*)src="([^"]*)"', embed, body)
