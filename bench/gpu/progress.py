"""Results of a check so far, in a file that is written after every step: nothing measured is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import recipes, records
from bench.gpu.runs import OURS
from bench.origin import Origin


@dataclass
class Progress:
    """The results and their file.

    Attributes:
        results: origin, `tests`, `rates`, `rows`, `recipes`, `training`, `velocity`, `presets`, and how far the check
            has come: `begun` steps, those `left_out` for lack of time, errors by step (`failed`), `crashes`.
    """

    file: Path
    results: dict[str, Any]

    @classmethod
    def begin(cls, origin: Origin, folder: Path) -> Progress:
        """Write a file without results, in place of the last one of the same card."""
        results: dict[str, Any] = {
            **origin.fields(),
            **dict.fromkeys(("tests", "rates", "velocity")),
            **{name: [] for name in ("rows", "recipes", "training", "presets", "begun", "left_out", "crashes")},
            "failed": {},
            "interrupted": False,
        }
        kind = f"gpu-{origin.machine['card'].replace(' ', '-')}"
        return cls(records.keep(kind, results, origin.date, folder), results)

    @classmethod
    def load(cls, file: Path) -> Progress:
        return cls(file, json.loads(file.read_text()))

    def save(self) -> None:
        records.write(self.file, records.as_text(self.results) + "\n")

    def problems(self) -> list[str]:
        """Everything for which the check fails: wrong or missing answers of ours, not those of baselines."""
        results, found = self.results, []
        if results["tests"] and not results["tests"]["passed"]:
            found.append("the GPU tests failed")
        for row in results["rows"]:
            if row["implementation"] != OURS:
                continue
            name = f"{row['run']['kind']}, {row['run']['name']}"
            if "failed" in row:
                found += [f"{name}: {row['failed']}"] if not row["failed"].startswith("TimeoutError") else []
            elif not row["error"] <= row["bound"]:  # NaN is above every bound
                found.append(f"{name}: error {row['error']:.1e} above {row['bound']:.0e}")
        found += filter(None, map(recipes.problem, results["recipes"]))
        found += [f"{step}: {problem}" for step, problem in results["failed"].items()]
        found += [f"{crash['step']}: {crash['reason']}" for crash in results["crashes"]]
        return found + (["interrupted"] if results["interrupted"] else [])
