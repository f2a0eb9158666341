"""One JSON with the last entry of every check, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import records
from bench.records import RESULTS
from bench.reliability.checks import CHECKS, Entry

KIND = "reliability-cpu"


def newest(folder: Path = RESULTS) -> dict[str, Any]:
    """The last results, or some without a check."""
    return records.newest(KIND, folder) or {"checks": {}}


def keep(name: str, entry: Entry, commit: str, folder: Path = RESULTS) -> Path:
    """The last results with this entry in place of that check's, in the one file there is, of today."""
    here, date = records.machine(), records.today()
    checks = newest(folder)["checks"]
    # Machine, too: other entries may come from elsewhere.
    checks[name] = {"date": date, "commit": commit, "machine": here, **entry}
    checks = {known: checks[known] for known in CHECKS if known in checks}
    return records.keep(KIND, {"date": date, "machine": here, "commit": commit, "checks": checks}, date, folder)


def result(name: str, entry: Entry) -> str:
    """An entry in words."""
    if "skipped" in entry:
        return f"not run: {entry['skipped']}"
    if "failed" in entry:
        return f"**failed**: {entry['failed'].splitlines()[0]}"
    return ("" if entry["passed"] else "**failed**: ") + CHECKS[name].say(entry)


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: a row for each check that has an entry."""
    rows = [
        f"| {name} | {CHECKS[name].what} | {result(name, entry)} | {entry['date']}, {entry['commit']} |"
        for name, entry in results["checks"].items()
    ]
    return ["| check | what was done | result | date, commit |", "|---|---|---|---|", *rows]
