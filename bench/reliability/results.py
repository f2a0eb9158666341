"""One JSON with the last entry of every check, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import records
from bench.origin import Origin
from bench.records import RESULTS
from bench.reliability.checks import CHECKS, Entry

KIND = "reliability-cpu"


def newest(folder: Path = RESULTS) -> dict[str, Any]:
    """The last results, or some without a check."""
    return records.newest(KIND, folder) or {"checks": {}}


def keep(name: str, entry: Entry, commit: str, folder: Path = RESULTS) -> Path:
    """Keep this entry in place of that check's last one, in one file for all checks, of today."""
    origin = Origin.here(commit=commit)
    checks = newest(folder)["checks"]
    # Each with its origin: other entries may come from elsewhere.
    checks[name] = {**origin.fields(), **entry}
    checks = {known: checks[known] for known in CHECKS if known in checks}
    return records.keep(KIND, {**origin.fields(), "checks": checks}, origin.date, folder)


def result(name: str, entry: Entry) -> str:
    """An entry in words."""
    if "skipped" in entry:
        return f"not run: {entry['skipped']}"
    if "failed" in entry:
        return f"**failed**: {entry['failed'].splitlines()[0]}"
    return ("" if entry["passed"] else "**failed**: ") + CHECKS[name].describe(entry)


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: a row for each check that has an entry."""
    rows = [
        f"| {name} | {CHECKS[name].what} | {result(name, entry)} | {entry['date']}, {entry['commit']} |"
        for name, entry in results["checks"].items()
    ]
    return ["| check | what was done | result | date, commit |", "|---|---|---|---|", *rows]
