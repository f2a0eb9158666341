"""Figures: distance against the number of sampling steps, and mixing times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as style
from experiments.common.objectives import COLORS


def draw_curves(
    path: Path,
    by_field: Mapping[str, Mapping[int, Sequence[float]]],
    floor: float,
    best: str,
    ylabel: str,
) -> None:
    """Draw the distance by number of steps (Fig. 6): mean, one point per seed, and the distance `floor` of `best`."""
    fig, axes = style.new_figure(4.2, 3.3)
    for name, by_steps in by_field.items():
        color = color_of(name)
        steps = sorted(by_steps)
        lines = ("-", "--", ":", "-.")
        alike = [other for other in by_field if color_of(other) == color]
        line = lines[alike.index(name) % len(lines)]
        axes.plot(steps, [np.mean(by_steps[k]) for k in steps], line, color=color, label=name)
        for k in steps:
            axes.plot([k] * len(by_steps[k]), by_steps[k], "o", color=color, ms=3)
    axes.axhline(floor, color=style.DATA, lw=0.8, ls="--", label=best)
    axes.set(xlabel="predictor-corrector steps", ylabel=ylabel, xscale="log", yscale="log")
    ticks = sorted({k for by_steps in by_field.values() for k in by_steps})
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    fig.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    style.save(fig, path)


def draw_bars(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw one panel per quantity, with one point per seed and field and a bar at the mean."""
    fig, axes = style.new_figure(2.7 * len(panels), 3.2, 1, len(panels), squeeze=False)
    for panel, (title, found) in zip(axes[0], panels.items(), strict=True):
        _draw_fields(panel, found)
        panel.set_title(title)
    style.save(fig, path)


def draw_few_steps(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], floor: float) -> None:
    """Draw the distances of all fields, one panel per procedure and number of steps, and that of exact samples."""
    fig, axes = style.new_figure(2.7 * len(panels), 3.2, 1, len(panels), squeeze=False, sharey=True)
    for panel, (title, found) in zip(axes[0], panels.items(), strict=True):
        _draw_fields(panel, found)
        panel.axhline(floor, color=style.DATA, lw=0.8, ls="--")
        panel.set(title=title, yscale="log")
    axes[0, 0].set_ylabel("sliced W2 to exact samples")
    style.save(fig, path)


def _draw_fields(panel: Any, found: Mapping[str, Sequence[float]]) -> None:
    for place, (name, values) in enumerate(found.items()):
        measured = [value for value in values if np.isfinite(value)]
        if measured:
            panel.bar(place, np.mean(measured), 0.5, color=color_of(name), alpha=0.35)
            panel.plot([place] * len(measured), measured, "o", color=color_of(name), ms=4)
    panel.set_xticks(range(len(found)), list(found), rotation=60, ha="right")


def color_of(name: str) -> str:
    """Return the color of a field: that of its objective, whatever the weight of the proxy."""
    return COLORS.get(name.split(",")[0], style.REFERENCE)
