"""One HTML page of all runs, made from their summary.json alone.

So runs that were made elsewhere and published can be gathered as well.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.registry import UsageError
from experiments.common.results import HOLDS
from experiments.common.summary import RESULT_COLUMNS, SOURCE

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


def write_report(runs: Path, page: Path) -> tuple[int, int]:
    """Gather all runs below the folder `runs` into one HTML page that needs no other file.

    Returns:
        The numbers of finished and of unfinished runs on the page.

    Raises:
        UsageError: there is no run below `runs`.
    """
    read = {path.parent: _read_summary(path) for path in sorted(runs.rglob("summary.json"))}
    finished = {folder: summary for folder, summary in read.items() if summary is not None}
    unfinished = sorted({path.parent for path in runs.rglob("config.json")} - set(finished))
    begun = [cells for folder in unfinished if (cells := _begun(folder, runs))]
    if not finished and not begun:
        raise UsageError(f"no runs below {runs}; make one with `python -m experiments run NAME`")
    overview: list[list[str]] = []
    contents: list[str] = []
    sections: list[str] = []
    for number, (folder, summary) in enumerate(finished.items()):
        cells = [_text(entry) for entry in _overview(summary)]
        overview.append([f'<a href="#run{number}">{cells[0]}</a>', *cells[1:]])
        name = html.escape(folder.relative_to(runs).as_posix())
        contents.append(f'<li><a href="#run{number}">{_text(summary["title"])}</a> <small>{name}</small></li>')
        sections.append(f'<section id="run{number}">\n{_section(summary, folder)}\n</section>')
    parts = ["<h1>Flux Matching: experiments</h1>", "<h2>Overview</h2>", _table(_OVERVIEW, overview)]
    if begun:
        parts += ["<h2>Unfinished</h2>", _table(("folder", "experiment", "preset", "backend"), begun)]
    parts += ["<h2>Contents</h2>", f"<ul>{''.join(contents)}</ul>", *sections]
    page.parent.mkdir(parents=True, exist_ok=True)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>Flux Matching: experiments</title>'
        f"<style>{_CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return len(finished), len(begun)


def _read_summary(path: Path) -> dict[str, Any] | None:
    """Read a run's summary.json; None if it is a file of some other program."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    wanted = {"title", "claim", "paper", "results", "figures", "notes", "command", "entries"}
    return found if isinstance(found, dict) and wanted <= set(found) else None


def _begun(folder: Path, runs: Path) -> list[str] | None:
    """Return the cells of an unfinished run; None for a config.json of some other program."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cells = [found["experiment"], found["preset"], found["backend"]["resolved"]]
    except (KeyError, TypeError, ValueError):
        return None
    return [html.escape(str(cell)) for cell in (folder.relative_to(runs).as_posix(), *cells)]


def _overview(summary: dict[str, Any]) -> list[str]:
    """Return the run's line of the overview; "holds" counts the results that do among those that are checked."""
    verdicts = [result["holds"] for result in summary["results"]]
    yes = verdicts.count(True)
    entries = summary["entries"] | {"holds": f"{yes}/{yes + verdicts.count(False)}"}
    return [entries.get(name, "") for name in _OVERVIEW]


def _section(summary: dict[str, Any], folder: Path) -> str:
    """Return a run as HTML, its figures inside."""
    results = [[row["quantity"], row["paper"], row["ours"], HOLDS[row["holds"]]] for row in summary["results"]]
    source = f"{SOURCE}, {summary['paper']}."
    parts = [
        f"<h2>{_text(summary['title'])}</h2>",
        f"<p>{_text(summary['claim'])}</p>",
        f"<p>{_text(source)}</p>",
        _table(RESULT_COLUMNS, [list(map(_text, row)) for row in results]),
    ]
    for figure in summary["figures"]:
        parts.append(f"<p>{_image(figure['path'], folder)}</p>\n<p>{_text(figure['caption'])}</p>")
    if summary["notes"]:
        notes = "".join(f"<li>{_text(note)}</li>" for note in summary["notes"])
        parts += ["<h3>Notes</h3>", f"<ul>{notes}</ul>"]
    entries = [[_text(name), _text(value)] for name, value in summary["entries"].items()]
    parts += ["<h3>How it was made</h3>", f"<pre>{html.escape(summary['command'])}</pre>"]
    return "\n".join([*parts, _table(("entry", "value"), entries)])


def _image(name: str, folder: Path) -> str:
    """Return an image that contains its file; without the file a browser shows the alternative text."""
    path = folder / name
    inside = path.resolve().is_relative_to(folder.resolve())
    data = base64.b64encode(path.read_bytes()).decode() if inside and path.is_file() else ""
    source = f"data:image/png;base64,{data}" if data else "data:,"
    return f'<img alt="{html.escape(path.stem)}" src="{source}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the cells are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    """Return text as HTML, with `code` marked as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(value)))
