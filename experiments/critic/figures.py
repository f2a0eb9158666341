"""Figures: bias and noise of the estimators, the error against steps of the critic, and curves of trainings."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from matplotlib.ticker import NullFormatter

from experiments.common import figures as style
from experiments.common.run import Run
from experiments.critic.methods import (
    CONTROL,
    CRITIC,
    CRITIC_NOISE,
    CRITIC_SCORE,
    CROSS,
    DSM,
    FEATURES,
    FOLLOWERS,
    LEARNED,
    METHODS,
    SINGLE,
)
from experiments.critic.problems import MIXTURE, NAMES
from experiments.critic.results import GOAL, alignments, estimates

COLORS = {
    CROSS: style.FLUX,
    SINGLE: "#56B4E9",
    FEATURES: style.DATA,
    CRITIC: style.SCORE_MATCHING,
    CRITIC_NOISE: style.ACCENT,
    CRITIC_SCORE: style.VIOLATING,
    LEARNED: style.PRESERVING,
    CONTROL: "#004D40",
    DSM: style.REFERENCE,
}
LINES = {CONTROL: ":", DSM: "--"}


def draw_estimates(path: Path, run: Run) -> None:
    """Draw error, alignment and signal-to-noise ratio per second against the stage, a row per problem."""
    stages = run.config.stages
    figure, panels = style.new_figure(10.4, 5.6, 2, 3, sharex=True)
    for row, name in zip(panels, NAMES, strict=True):
        for axes, column in zip(row, ("error", "alignment", "rate"), strict=True):
            for method, color in COLORS.items():
                cases = [(run, name, stage, method, 0) for stage in stages]
                found = [alignments(*case) if column == "alignment" else estimates(*case, column) for case in cases]
                if all(found):
                    means = [statistics.mean(values) for values in found]
                    axes.plot(stages, means, "o" + LINES.get(method, "-"), ms=4, color=color, label=method)
            axes.set(xscale="log", yscale="linear" if column == "alignment" else "log")
            axes.set_xticks(stages, list(map(str, stages)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(f"{name}\nrelative error of the mean gradient")
        row[1].set_ylabel("cosine of one minibatch's gradient")
        row[2].set_ylabel("signal-to-noise ratio per CPU second")
    for axes in panels[1]:
        axes.set_xlabel("steps of the training of the field")
    handles, labels = panels[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    style.save(figure, path)


def draw_steps(path: Path, run: Run) -> None:
    """Draw the error against further steps at the fixed field, a row per problem, a column per stage."""
    config = run.config
    figure, panels = style.new_figure(
        2.9 * len(config.stages), 5.2, 2, len(config.stages), sharex=True, sharey="row", squeeze=False
    )
    for row, name in zip(panels, NAMES, strict=True):
        for axes, stage in zip(row, config.stages, strict=True):
            for method in FOLLOWERS:
                means = [statistics.mean(estimates(run, name, stage, method, k, "error")) for k in config.extra]
                axes.plot(config.extra, means, "o-", ms=4, color=COLORS[method], label=method)
            cross = statistics.mean(estimates(run, name, stage, CROSS, 0, "error"))
            axes.axhline(cross, color=COLORS[CROSS], linestyle="--", label=CROSS)
            axes.set(yscale="log", title=f"{name}, after {stage} steps")
            axes.set_xscale("symlog", linthresh=2)
            axes.set_xticks(config.extra, list(map(str, config.extra)))
        row[0].set_ylabel("relative error of the gradient")
    for axes in panels[1]:
        axes.set_xlabel("further steps of the critic")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    style.save(figure, path)


def draw_curves(path: Path, run: Run) -> None:
    """Draw σ² J and the distance against CPU seconds, a row per problem; a thin line per seed and their median."""
    figure, panels = style.new_figure(8.4, 6.0, 2, 2)
    for row, name in zip(panels, NAMES, strict=True):
        for axes, column in zip(row, ("loss", "distance"), strict=True):
            for method in METHODS:
                _draw_curve(axes, run, name, method, column)
            axes.set(yscale="log", xlabel="CPU seconds")
        starts = [row["loss"] for row in run.rows("curve") if row["problem"] == name and not row["part"]]
        row[0].axhline(GOAL * statistics.mean(starts), color="black", linewidth=0.8, linestyle=":")
        row[0].set_ylabel(f"{name}\nσ² J")
        row[1].set_ylabel("energy distance" if name == MIXTURE else "W2")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    style.save(figure, path)


def _draw_curve(axes: object, run: Run, name: str, method: str, column: str) -> None:
    curves: dict[float, list[float]] = {}
    for row in run.rows("curve"):
        if (row["problem"], row["method"]) == (name, method) and math.isfinite(row[column]):
            curves.setdefault(row["seconds"], []).append(row[column])
    times = sorted(curves)
    medians = [statistics.median(curves[time]) for time in times]
    low, high = ([pick(curves[time]) for time in times] for pick in (min, max))
    axes.plot(times, medians, "o" + LINES.get(method, "-"), ms=3, color=COLORS[method], label=method)  # type: ignore[attr-defined]
    axes.fill_between(times, low, high, color=COLORS[method], alpha=0.12, linewidth=0)  # type: ignore[attr-defined]
