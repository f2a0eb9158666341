"""Dated results in bench/results: a file of every kind, the newest in place of the last; where they come from."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def commit() -> str:
    """What is checked out, "-dirty" if it was changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Processor, threads, system and versions."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def where(machine: dict[str, Any], commit: str, card: str = "") -> str:
    """The same as a sentence, with the GPU's name in the processor's place if it was one that computed."""
    processor = card or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{processor}, {machine['system']}, Python {machine['python']}, torch {machine['torch']}, commit {commit}."


def duration(seconds: float) -> str:
    """Three digits, in s, ms or µs."""
    factor, unit = next((f, u) for f, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if f * seconds >= 0.9995 or f == 1e6)
    return f"{factor * seconds:.3g} {unit}"


def keep_text(kind: str, text: str, date: str, ending: str, folder: Path = RESULTS) -> Path:
    """<date>-<kind>.<ending> in place of the last of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*-{kind}.{ending}"):
        old.unlink()
    file = folder / f"{date}-{kind}.{ending}"
    file.write_text(text)
    return file


def keep(kind: str, results: dict[str, Any], date: str, folder: Path = RESULTS) -> Path:
    """The same of results, as JSON."""
    return keep_text(kind, json.dumps(results, indent=1, ensure_ascii=False) + "\n", date, "json", folder)


def newest(kind: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The last results of a kind, such as "speed-cpu", or None."""
    files = sorted(folder.glob(f"*-{kind}.json"))  # names begin with the date
    found: dict[str, Any] | None = json.loads(files[-1].read_text()) if files else None
    return found
