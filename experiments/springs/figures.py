"""Figures of the mask's effect, of real and generated trajectories, and of the masses in motion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor

from experiments.common import figures as style
from experiments.common.objectives import COLORS


def draw_change(path: Path, changes: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    """Draw the relative change of W2 by the mask against iterations: mean, and one point per seed (Fig. 7, right)."""
    fig, axes = style.new_figure(4.2, 2.8)
    for objective, by_stage in changes.items():
        stages, percent = list(by_stage), 100 * np.array(list(by_stage.values()))
        axes.plot(stages, percent.mean(1), "o-", color=COLORS[objective], label=objective)
        for seed in percent.T:
            axes.plot(stages, seed, "o", color=COLORS[objective], ms=2.5, alpha=0.5)
        axes.set_xticks(stages)
    axes.axhline(0, color=style.DATA, lw=0.8)
    axes.set(xlabel="iterations", ylabel="change of W2 by the mask (%)")
    axes.legend()
    style.save(fig, path)


def draw_linear(
    path: Path,
    distances: Mapping[str, Mapping[float, float]],
    sizes: Mapping[str, Mapping[float, float]],
    trained: Mapping[str, Mapping[float, float]],
) -> None:
    """Draw W2 by number of sampling steps, and σ times the field's root mean square by σ, of linear fields.

    Crosses in the second panel are the trained fields with the mask.
    """
    fig, (left, right) = style.new_figure(6.5, 2.8, 1, 2)
    colors = (style.DATA, style.FLUX, style.SCORE_MATCHING)
    for name, color in zip(distances, colors, strict=True):
        for axes, found in ((left, distances[name]), (right, sizes[name])):
            axes.plot(list(found), list(found.values()), "o-", ms=4, color=color, label=name)
    for objective, found in trained.items():
        right.plot(list(found), list(found.values()), "x", ms=6, color=COLORS[objective], label=f"{objective}, trained")
    right.legend()
    left.set(xscale="log", yscale="log", xlabel="steps of the sampler", ylabel="W2 to the data's Gaussian")
    steps = [int(count) for count in next(iter(distances.values()))]
    left.set_xticks(steps, [str(count) for count in steps])
    left.set_xticks([], minor=True)
    right.set(xscale="log", yscale="log", xlabel="σ", ylabel="σ × root mean square of the field")
    left.legend()
    style.save(fig, path)


def draw_line(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the zero of the loss's gradient on the line of fields by σ, and the same for centers that are each alone."""
    fig, axes = style.new_figure(4.2, 2.8)
    for refs, color in zip(sorted({row["refs"] for row in rows}), (style.FLUX, style.PRESERVING), strict=True):
        found = [row for row in rows if row["refs"] == refs]
        x, y, error = ([row[name] for row in found] for name in ("sigma", "stop", "error"))
        label = f"{refs} reference points more" if refs else "minibatch of 256"
        axes.errorbar(x, y, error, fmt="o-", ms=4, capsize=2, color=color, label=label)
    axes.plot(x, [row["alone"] for row in found], "--", color=style.REFERENCE, label="each center alone")
    axes.axhline(0, color=style.DATA, lw=0.8)
    axes.set(xscale="log", xlabel="σ", ylabel="0: keeps p_σ, 1: masked DSM")
    axes.legend()
    style.save(fig, path)


def draw_trajectories(path: Path, by_model: Mapping[str, Tensor], spacing: float, shown: int = 12) -> None:
    """Draw the first position over time and both positions in a plane; one row per model, the simulator first."""
    fig, axes = style.new_figure(6.5, 1.7 * len(by_model), len(by_model), 2, squeeze=False)
    for (over_time, plane), (name, found) in zip(axes, by_model.items(), strict=True):
        time = spacing * np.arange(found.shape[1])
        for trajectory in found[:shown].numpy():
            over_time.plot(time, trajectory[:, 0], lw=0.8)
            plane.plot(trajectory[:, 0], trajectory[:, 2], lw=0.8)
        over_time.set(ylabel=f"{name}\nposition 1", ylim=(-9, 9))
        plane.set(ylabel="position 2", xlim=(-9, 9), ylim=(-9, 9))
    axes[-1, 0].set_xlabel("time")
    axes[-1, 1].set_xlabel("position 1")
    style.save(fig, path)


def animate(path: Path, by_model: Mapping[str, Tensor]) -> None:
    """Save a GIF of two masses between two walls: one trajectory per model, the simulator first."""
    fig, axes = style.new_figure(5.0, 0.9 * len(by_model), len(by_model), 1, squeeze=False)
    wall, rest = 14.0, 5.0  # masses rest at ∓5 between walls at ∓14
    dots = []
    for panel, name in zip(axes[:, 0], by_model, strict=True):
        panel.set(xlim=(-wall, wall), ylim=(-1, 1), yticks=[], xticks=[])
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.grid(False)
        dots.append(panel.plot([], [], "-o", color=style.DATA, mfc=style.FLUX, ms=9, lw=0.8)[0])

    def draw(frame: int) -> list[Any]:
        for line, found in zip(dots, by_model.values(), strict=True):
            q1, q2 = found[0, frame, [0, 2]].tolist()
            line.set_data([-wall, q1 - rest, q2 + rest, wall], [0, 0, 0, 0])
        return dots

    length = next(iter(by_model.values())).shape[1]
    FuncAnimation(fig, draw, frames=length, blit=False).save(path, writer=PillowWriter(fps=12), dpi=80)
