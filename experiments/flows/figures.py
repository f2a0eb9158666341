"""Figures: distance against evaluations, trajectories, variance of the gradient, and samples in motion."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor

from experiments.common import figures as style
from experiments.flows.results import standard_error

FRAMES = 24


def draw_means(
    axes: Any, by_number: Mapping[int, Sequence[float]] | Mapping[float, Sequence[float]], **look: Any
) -> None:
    """Draw mean and standard error of the values at each number, joined by lines."""
    means = [statistics.mean(values) for values in by_number.values()]
    errors = [standard_error(values) for values in by_number.values()]
    axes.errorbar(list(by_number), means, errors, fmt="o-", **look)


def draw_distances(
    path: Path, panels: Sequence[Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]], floors: Sequence[float]
) -> None:
    """Draw W2 against the number of evaluations: mean and standard error over seeds.

    Args:
        path: file to write.
        panels: one column of panels per problem: title -> variant -> evaluations -> one value per seed.
        floors: W2 of more new data, for each problem.
    """
    fig, axes = style.new_figure(7.2, 5.4, len(panels[0]), len(panels), sharex=True, sharey="col", squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for found in panel.values() for name in found))
    colors = dict(zip(names, style.CYCLE, strict=False))
    counts = sorted({count for panel in panels for by in panel.values() for found in by.values() for count in found})
    for column, (panel, floor) in enumerate(zip(panels, floors, strict=True)):
        for ax, (title, by_variant) in zip(axes[:, column], panel.items(), strict=True):
            for name, found in by_variant.items():
                draw_means(ax, found, ms=3, lw=1.2, color=colors[name], label=name)
            ax.axhline(floor, color=style.DATA, lw=0.8, ls="--", label="more new data")
            ax.set(title=title, xscale="log", yscale="log")
            ax.set_xticks(counts, [str(count) for count in counts])
            ax.set_xticks([], minor=True)
        axes[-1, column].set_xlabel("evaluations of the field")
    for ax in axes[:, 0]:
        ax.set_ylabel("W2 to new data")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    style.save(fig, path)


def draw_trajectories(path: Path, by_problem: Mapping[str, Mapping[str, Tensor]], shown: int = 120) -> None:
    """Draw trajectories with start and end, one row per problem, one column per variant.

    Args:
        path: file to write.
        by_problem: problem -> variant -> trajectories `[times, samples, 2]`.
        shown: number of samples drawn.
    """
    rows, cols = len(by_problem), len(next(iter(by_problem.values())))
    fig, axes = style.new_figure(2.1 * cols, 2.2 * rows, rows, cols, sharex="row", sharey="row", squeeze=False)
    for row, (problem, by_variant) in zip(axes, by_problem.items(), strict=True):
        for ax, (variant, trajectories) in zip(row, by_variant.items(), strict=True):
            lines = trajectories[:, :shown].numpy()
            ax.plot(lines[..., 0], lines[..., 1], color=style.REFERENCE, lw=0.5)
            ax.scatter(*lines[0].T, s=3, color=style.SCORE_MATCHING, zorder=3)
            ax.scatter(*lines[-1].T, s=3, color=style.FLUX, zorder=3)
            ax.set(aspect="equal", xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if ax in axes[0]:
                ax.set_title(variant)
        row[0].set_ylabel(problem)
    style.save(fig, path)


def draw_variances(path: Path, by_target: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Draw the variance of the gradient against the time: mean and standard error over seeds."""
    fig, axes = style.new_figure(4.2, 2.8)
    for (name, found), color in zip(by_target.items(), (style.SCORE_MATCHING, style.FLUX), strict=True):
        draw_means(axes, found, ms=4, color=color, label=name)
    axes.set(yscale="log", xlabel="t", ylabel="variance of the gradient")
    axes.legend()
    style.save(fig, path)


def animate(path: Path, by_variant: Mapping[str, Tensor]) -> None:
    """Save a GIF of samples that move from the source to the data, one panel per variant, colored by their start.

    Args:
        path: file to write.
        by_variant: trajectories at equal steps of time, `[times, samples, 2]`.
    """
    fig, axes = style.new_figure(2.0 * len(by_variant), 2.3, 1, len(by_variant), squeeze=False)
    length = len(next(iter(by_variant.values())))
    moments = np.linspace(0, length - 1, min(FRAMES, length)).round().astype(int)
    limit = 1.05 * max(found.abs().max().item() for found in by_variant.values())
    points = []
    for ax, (name, found) in zip(axes[0], by_variant.items(), strict=True):
        start = found[0].numpy()
        colors = np.arctan2(start[:, 1], start[:, 0])
        points.append(ax.scatter(*start.T, s=3, c=colors, cmap="hsv"))
        ax.set(title=name, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])

    def draw(frame: int) -> list[Any]:
        moment = moments[min(frame, len(moments) - 1)]
        for dots, found in zip(points, by_variant.values(), strict=True):
            dots.set_offsets(found[moment].numpy())
        return points

    still = len(moments) // 3  # frames at the end without motion
    FuncAnimation(fig, draw, frames=len(moments) + still, blit=False).save(path, writer=PillowWriter(fps=12), dpi=70)
