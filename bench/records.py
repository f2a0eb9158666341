"""Dated results in bench/results: one file of every kind, the newest in place of the last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def duration(seconds: float) -> str:
    """Three digits, in s, ms or µs."""
    factor, unit = next((f, u) for f, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if f * seconds >= 0.9995 or f == 1e6)
    return f"{factor * seconds:.3g} {unit}"


def as_text(value: Any, depth: int = 2) -> str:
    """JSON with one line per entry, down to that depth of nesting."""
    if depth and value and isinstance(value, (dict, list)):
        if isinstance(value, dict):
            parts = [f"{json.dumps(str(key), ensure_ascii=False)}: {as_text(v, depth - 1)}" for key, v in value.items()]
        else:
            parts = [as_text(v, depth - 1) for v in value]
        begin, end = "{}" if isinstance(value, dict) else "[]"
        inner = ",\n".join(parts).replace("\n", "\n ")
        return f"{begin}\n {inner}\n{end}"
    return json.dumps(value, ensure_ascii=False)


def write(file: Path, text: str) -> None:
    """Write a file in one moment: readers and a sudden end find the old text or the new one, whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def keep_text(kind: str, text: str, date: str, ending: str, folder: Path = RESULTS) -> Path:
    """Write <date>-<kind>.<ending> in place of the last of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{date}-{kind}.{ending}"
    write(file, text)
    for old in folder.glob(f"*-{kind}.{ending}"):
        if old != file:
            old.unlink()
    return file


def keep(kind: str, results: dict[str, Any], date: str, folder: Path = RESULTS) -> Path:
    """Write results as JSON in place of the last of their kind."""
    return keep_text(kind, as_text(results) + "\n", date, "json", folder)


def newest(kind: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The last results of a kind, such as "speed-cpu", or None."""
    files = sorted(folder.glob(f"*-{kind}.json"))  # names begin with the date
    found: dict[str, Any] | None = json.loads(files[-1].read_text()) if files else None
    return found
