"""Results and figures of a run, and numbers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOLDS = {True: "yes", False: "NO", None: ""}  # in the last column of the table


@dataclass(frozen=True)
class Result:
    """One line of a run's table.

    Args:
        quantity: what was measured.
        ours: the value measured here, as text.
        paper: the paper's value, as text.
        passed: whether the claim holds; None if the value is only reported.
    """

    quantity: str
    ours: str
    paper: str = "–"
    passed: bool | None = None

    @property
    def holds(self) -> str:
        """Word in the last column of the table, empty if the value is only reported."""
        return HOLDS[None if self.passed is None else bool(self.passed)]


@dataclass(frozen=True)
class Figure:
    """A figure in the run's folder, and the sentence below it."""

    path: Path
    caption: str


def spread(values: Sequence[float], digits: str = ".3f") -> str:
    """Format the mean, and the standard deviation if there are several values, both by `digits`."""
    mean = f"{statistics.mean(values):{digits}}"
    alone = len(values) == 1 or not all(map(math.isfinite, values))
    return mean if alone else f"{mean} ± {statistics.stdev(values):{digits.removeprefix('+')}}"


def duration(seconds: float) -> str:
    """Format a length of time, such as "42 s", "3 min 20 s" or "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
