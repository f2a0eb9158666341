"""Figures: the ranking of known fields, and evaluations per draw against bias."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.augment import problems
from experiments.augment.measure import TURNS, kinds
from experiments.augment.results import levels, relative
from experiments.augment.training import EXACT, LEARNED, SCORE, TRAINED, TRAINED_LEARNED
from experiments.common import figures as style
from experiments.common.run import Run

COLORS = {
    SCORE: style.SCORE_MATCHING,
    EXACT: style.PRESERVING,
    LEARNED: style.FLUX,
    TRAINED: style.ACCENT,
    TRAINED_LEARNED: style.VIOLATING,
}


def draw_ranking(run: Run, path: Path) -> None:
    """Draw measured time, autocorrelation loss and proxy of s + αJs, each over its value for the score."""
    fig, axes = style.new_figure(4.6, 3.2)
    for column, name, color in (
        ("time", "measured autocorrelation time", style.DATA),
        ("loss", "autocorrelation loss", style.FLUX),
        ("proxy", "proxy of Eq. 44", style.SCORE_MATCHING),
    ):
        found = relative(run, column)
        axes.plot(TURNS, [np.mean(found[turn]) for turn in TURNS], color=color, label=name)
        for turn in TURNS:
            axes.plot([turn] * len(found[turn]), found[turn], "o", color=color, ms=3)
    axes.set(xlabel="α of s + αJs", ylabel="relative to the score", xticks=TURNS, ylim=(0, None))
    axes.legend(loc="lower left", fontsize=8)
    style.save(fig, path)


def draw_costs(run: Run, path: Path) -> None:
    """Draw, by problem and field, the fewest evaluations per draw of all schedules with at most that bias."""
    fig, panels = style.new_figure(2.6 * len(problems.PROBLEMS), 3.2, 1, len(problems.PROBLEMS))
    for axes, name in zip(panels, problems.PROBLEMS, strict=True):
        for field in kinds(run, name):
            for seed in range(run.config.seeds):
                biases, fewest = envelope(run, name, field, seed)
                label = field if not seed else None
                axes.step(biases, fewest, where="post", color=COLORS[field], lw=1.0, label=label)
        for bias in levels(run, name):
            axes.axvline(bias, color=style.REFERENCE, lw=0.8, ls=":")
        axes.set(title=name, xlabel="bias")
        if any(len(line.get_xdata()) for line in axes.lines[:-2]):
            axes.set(xscale="log", yscale="log")
    panels[0].set_ylabel("evaluations per independent draw")
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    style.save(fig, path)


def envelope(run: Run, name: str, field: str, seed: int) -> tuple[list[float], list[float]]:
    """Return increasing biases, and the fewest evaluations per draw of all schedules with at most that bias."""
    known = {"problem": name, "field": field, "seed": seed}
    rows = [row for row in run.rows("cost") if known.items() <= row.items()]
    limit = levels(run, name)[0]
    points = sorted((max(row["bias"], limit / 5), row["evaluations"]) for row in rows if row["bias"] < 5 * limit)
    biases, fewest, best = [], [], math.inf
    for bias, count in points:
        if count < best:
            best = count
            biases.append(bias)
            fewest.append(count)
    return biases, fewest
