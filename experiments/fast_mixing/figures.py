"""Figures: distance against the number of sampling steps, and mixing times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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
        color = COLORS.get(name, style.REFERENCE)
        steps = sorted(by_steps)
        axes.plot(steps, [np.mean(by_steps[k]) for k in steps], color=color, label=name)
        for k in steps:
            axes.plot([k] * len(by_steps[k]), by_steps[k], "o", color=color, ms=3)
    axes.axhline(floor, color=style.DATA, lw=0.8, ls="--", label=best)
    axes.set(xlabel="predictor-corrector steps", ylabel=ylabel, xscale="log", yscale="log")
    ticks = sorted({k for by_steps in by_field.values() for k in by_steps})
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    fig.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    style.save(fig, path)


def draw_mixing(path: Path, *columns: Mapping[str, Sequence[float]]) -> None:
    """Draw autocorrelation time, proxy and bias: one point per seed, and a bar at the mean."""
    fig, panels = style.new_figure(9.0, 3.0, 1, 3)
    titles = ("autocorrelation time (σ²)", "proxy (Eq. 44)", "W2 of the chain's end to p_σ")
    for axes, found, title in zip(panels, columns, titles, strict=True):
        for place, (name, values) in enumerate(found.items()):
            color = COLORS.get(name, style.REFERENCE)
            measured = [value for value in values if np.isfinite(value)]
            if measured:
                axes.bar(place, np.mean(measured), 0.5, color=color, alpha=0.35)
                axes.plot([place] * len(measured), measured, "o", color=color, ms=4)
        axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
        axes.set_title(title)
    style.save(fig, path)
