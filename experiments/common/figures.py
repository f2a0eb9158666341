"""Common style of all figures: sizes, colors, and saving.

Figures are made without pyplot, so no window system is needed and none is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

# The Okabe-Ito colors, which stay apart under the common forms of color blindness.
FLUX = "#0072B2"
SCORE_MATCHING = "#D55E00"
DATA = "#4D4D4D"
PRESERVING = "#009E73"
VIOLATING = "#CC79A7"
REFERENCE = "#999999"
ACCENT = "#E69F00"
CYCLE = (FLUX, SCORE_MATCHING, PRESERVING, VIOLATING, ACCENT, "#56B4E9", DATA)

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"

_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=CYCLE),
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "image.cmap": SEQUENTIAL,
    "lines.linewidth": 1.5,
}


def new_figure(width: float = 6.0, height: float = 3.6, rows: int = 1, cols: int = 1, **kw: Any) -> tuple[Figure, Any]:
    """Make a styled figure and its axes.

    Args:
        width: width of the whole figure in inches.
        height: height of the whole figure in inches.
        rows: number of rows of axes.
        cols: number of columns of axes.
        **kw: passed to `Figure.subplots`, such as `sharex=True` or `squeeze=False`.

    Returns:
        The figure and the result of `Figure.subplots`: one axes, or an array `[rows, cols]` without its dimensions
        of length 1.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, cols, **kw)


def save(fig: Figure, path: Path) -> None:
    """Write the figure to `path` at 150 dots per inch; the ending selects the format."""
    for axes in fig.axes:
        if (legend := axes.get_legend()) is not None:
            legend.set_frame_on(False)  # legends are made outside of the style's context
    with matplotlib.rc_context(_STYLE):
        # Tight: axes of equal scale can push a title of two lines over the edge of a constrained layout.
        fig.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.05)
