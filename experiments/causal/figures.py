"""Figures: errors, distances and structure by method."""

from __future__ import annotations

from pathlib import Path

from experiments.causal.measure import NO_EFFECT, TRUTH
from experiments.common import figures as style
from experiments.common.run import Run


def draw_errors(path: Path, run: Run) -> None:
    """Draw a panel per setting and measure, with a dot per system."""
    config = run.config
    settings = [(kind, d) for kind in config.kinds for d in config.dims]
    names = (NO_EFFECT, *config.methods, TRUTH)
    columns = {"error": "error of means (std)", "w2": "W2", "f1": "F1"}
    size = (3.0 * len(columns) + 1.0, 2.2 * len(settings))
    figure, panels = style.new_figure(*size, len(settings), len(columns), sharey=True, squeeze=False)
    for row, (kind, d) in zip(panels, settings, strict=True):
        for axes, (column, label) in zip(row, columns.items(), strict=True):
            for place, name in enumerate(names):
                values = run.by_seed("fit", column, setting=kind, d=d, method=name)
                axes.plot(values, [place] * len(values), "o", ms=4, alpha=0.7, color=style.CYCLE[place % 7])
            axes.set(xlabel=label, xlim=(0, None), title=f"{kind}, d = {d}")
        row[0].set_yticks(range(len(names)), names)
        row[0].invert_yaxis()
    style.save(figure, path)
