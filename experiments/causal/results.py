"""Comparison of the measurements, as lines of a table."""

from __future__ import annotations

from experiments.causal.measure import METHODS, NO_EFFECT, TRUTH
from experiments.common.results import Result, spread
from experiments.common.run import Run

COLUMNS = {"error": "error of means", "w2": "W2", "f1": "F1", "precision": "average precision", "seconds": "seconds"}


def results(run: Run) -> list[Result]:
    """Return a line per setting and method."""
    config = run.config
    lines = []
    for kind in config.kinds:
        for d in config.dims:
            for method in (NO_EFFECT, TRUTH, *config.methods):
                found = {c: run.by_seed("fit", c, setting=kind, d=d, method=method) for c in COLUMNS}
                text = "; ".join(f"{COLUMNS[c]} {spread(v, '.2f')}" for c, v in found.items() if v)
                lines.append(Result(f"{kind}, d = {d}: {method}", text))
    return lines
