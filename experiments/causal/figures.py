"""Figure: error, distance, structure and cost by method and setting."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import NullFormatter

from experiments.causal.measure import DUAL, FLUX, GAUSSIAN, NO_EFFECT, PAIRS, QUADRATIC, SMOOTHED, TRUTH
from experiments.common import figures as style
from experiments.common.run import Run

COLORS = {
    NO_EFFECT: style.REFERENCE,
    DUAL: style.FLUX,
    QUADRATIC: "#56B4E9",
    GAUSSIAN: style.SCORE_MATCHING,
    PAIRS: style.ACCENT,
    FLUX: style.VIOLATING,
    SMOOTHED: style.PRESERVING,
    TRUTH: style.DATA,
}
COLUMNS = {
    "error": "error of means (standard deviations)",
    "w2": "W2",
    "f1": "F1 of edges",
    "seconds": "CPU seconds of a fit",
}
LOGARITHMIC = ("error", "seconds")


def draw_methods(path: Path, run: Run) -> None:
    """Draw a row of panels per setting, a column per measure, with a dot per system."""
    settings = [(kind, d) for d in run.config.dims for kind in run.config.kinds]
    names = (NO_EFFECT, *run.config.methods, TRUTH)
    size = (2.6 * len(COLUMNS) + 1.0, 0.27 * len(names) * len(settings) + 0.6)
    figure, panels = style.new_figure(*size, len(settings), len(COLUMNS), sharey=True, squeeze=False)
    for row, (kind, d) in zip(panels, settings, strict=True):
        for axes, column in zip(row, COLUMNS, strict=True):
            for place, name in enumerate(names):
                values = run.by_seed("fit", column, setting=kind, d=d, method=name)
                axes.plot(values, [place] * len(values), "o", ms=4, alpha=0.8, color=COLORS[name])
            if column in LOGARITHMIC:
                every = [r[column] for r in run.rows("fit") if column in r]
                axes.set(xscale="log", xlim=(min(every) / 1.3, max(every) * 1.3))
                axes.xaxis.set_minor_formatter(NullFormatter())
        row[0].set_yticks(range(len(names)), names)
        row[0].set_ylabel(f"{kind}, d = {d}")
    for axes, label in zip(panels[-1], COLUMNS.values(), strict=True):
        axes.set_xlabel(label)
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    style.save(figure, path)
