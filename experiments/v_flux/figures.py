"""Figures: trajectories of the fields side by side, marginals, and energy beside the error in few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb
from torch import Tensor

from experiments.common import figures as style
from experiments.common.mixture import GaussianMixture
from experiments.v_flux import training
from experiments.v_flux.results import EXACT, EXACT_CAUSAL, EXACT_MASKED, MULTIPLE

COLORS = {
    training.FLUX: style.FLUX,
    training.TURNING: "#56B4E9",
    training.LEAST: style.PRESERVING,
    training.CAUSAL: style.VIOLATING,
    training.FLOW: style.SCORE_MATCHING,
    training.FLOW_CAUSAL: style.ACCENT,
    EXACT: style.DATA,
    EXACT_CAUSAL: style.REFERENCE,
    EXACT_MASKED: "#C8C8C8",
}
SHADES = LinearSegmentedColormap.from_list("density", ["white", "#9A9A9A"])


def _color(point: Tensor) -> Any:
    """Color of a trajectory, by the direction from the origin to its start."""
    hue = (math.atan2(point[1], point[0]) / (2 * math.pi)) % 1
    return hsv_to_rgb((hue, 0.9, 0.8))


def _draw_lines(axes: Any, paths: Tensor) -> None:
    """Draw trajectories `[K, N, 2]` with a dot at each start."""
    for line in paths.transpose(0, 1):
        axes.plot(line[:, 0], line[:, 1], color=_color(line[0]), lw=0.9)
        axes.plot(*line[0].tolist(), "o", color=_color(line[0]), ms=2.5)


def _draw_density(axes: Any, density: GaussianMixture, limit: float) -> None:
    """Draw a density in gray on [-limit, limit]²."""
    axis = torch.linspace(-limit, limit, 121, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis).to(density.means)
    p = density.log_density(x).exp().reshape(121, 121).T.cpu()
    axes.contourf(axis, axis, p, levels=np.linspace(0.02, 1, 9) * p.max().item(), cmap=SHADES)


def draw_gaussian(path: Path, trajectories: Mapping[str, Tensor], covariances: Sequence[Tensor]) -> None:
    """Draw trajectories of linear fields from one circle, over the ellipses |Σ^-½ x| = 1.5 of the marginals.

    Args:
        path: file to write.
        trajectories: `[K, N, 2]` by field.
        covariances: Σ at some times, `[2, 2]`.
    """
    fig, panels = style.new_figure(2.6 * len(trajectories), 2.8, 1, len(trajectories), sharex=True, sharey=True)
    angle = torch.linspace(0, 2 * torch.pi, 100, dtype=torch.float64)
    circle = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    for axes, (name, paths) in zip(panels, trajectories.items(), strict=True):
        for covariance in covariances:
            ellipse = circle @ torch.linalg.cholesky(covariance).T
            axes.plot(ellipse[:, 0], ellipse[:, 1], color=style.REFERENCE, lw=0.8)
        _draw_lines(axes, paths)
        axes.set(title=name, aspect="equal", xlabel="$x_1$")
    panels[0].set_ylabel("$x_2$")
    style.save(fig, path)


def draw_trajectories(path: Path, trajectories: Mapping[str, Tensor], data: GaussianMixture, limit: float) -> None:
    """Draw trajectories of the fields from the same starts, over the density of the data (Fig. 17).

    Args:
        path: file to write.
        trajectories: `[K, N, 2]` by field, at most eight.
        data: p_1.
        limit: half the side of the panels.
    """
    columns = (len(trajectories) + 1) // 2
    fig, panels = style.new_figure(2.5 * columns, 5.3, 2, columns, sharex=True, sharey=True)
    for axes in panels.flat[len(trajectories) :]:
        axes.set_axis_off()
    for axes, (name, paths) in zip(panels.flat, trajectories.items(), strict=False):
        axes.grid(False)
        _draw_density(axes, data, limit)
        _draw_lines(axes, paths)
        axes.set(title=name, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit))
    for axes in panels[-1]:
        axes.set_xlabel("$x_1$")
    for axes in panels[:, 0]:
        axes.set_ylabel("$x_2$")
    style.save(fig, path)


def draw_marginals(path: Path, samples: Mapping[str, Tensor], times: Sequence[float], limit: float) -> None:
    """Draw histograms of samples, one row per field and one column per time.

    Args:
        path: file to write.
        samples: `[times, N, 2]` by field.
        times: t of the columns.
        limit: half the side of the panels.
    """
    size = (1.35 * len(times) + 0.5, 1.35 * len(samples))
    fig, panels = style.new_figure(*size, len(samples), len(times), sharex=True, sharey=True)
    edges = np.linspace(-limit, limit, 41)
    for row, (name, by_time) in zip(panels, samples.items(), strict=True):
        for axes, points in zip(row, by_time.cpu().numpy(), strict=True):
            axes.grid(False)
            axes.hist2d(*points.T, bins=[edges, edges], cmap=style.SEQUENTIAL)
            axes.set(xticks=[], yticks=[], aspect="equal")
        row[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
    for axes, t in zip(panels[0], times, strict=True):
        axes.set_title(f"t = {t:g}")
    style.save(fig, path)


def draw_comparison(
    path: Path,
    energies: Mapping[str, float],
    ratios: Mapping[str, Mapping[float, float]],
    euler: Mapping[str, Mapping[int, float]],
    floor: float,
) -> None:
    """Draw kinetic energies, W2 along the path over that of exact samples, and W2 to the data by Euler steps.

    Args:
        path: file to write.
        energies: by field.
        ratios: by field and time.
        euler: W2 by field and number of steps.
        floor: W2 of exact samples of the data.
    """
    fig, (bars, along, few) = style.new_figure(11.0, 3.6, 1, 3)
    places = range(len(energies))
    bars.barh(places, list(energies.values()), color=[COLORS[name] for name in energies])
    bars.set_yticks(places, list(energies))
    bars.invert_yaxis()
    bars.axvline(energies[EXACT], color=style.DATA, lw=0.8, ls="--")
    bars.set(xlabel="kinetic energy $\\int E|f|^2 dt$")
    for name in energies:
        dashes = "--" if name in (EXACT, EXACT_CAUSAL, EXACT_MASKED) else "-"
        for axes, found in ((along, ratios[name]), (few, euler[name])):
            axes.plot(list(found), list(found.values()), dashes, marker="o", ms=3, color=COLORS[name])
    along.axhline(MULTIPLE, color=style.REFERENCE, lw=0.8, ls=":")
    along.set(xlabel="$t$", ylabel="W2 to $p_t$ over that of exact samples", xticks=list(next(iter(ratios.values()))))
    few.axhline(floor, color=style.DATA, lw=0.8, ls=":")
    steps = list(next(iter(euler.values())))
    few.set(xlabel="Euler steps", ylabel="W2 to the data", xscale="log", ylim=(0, None))
    few.set_xticks(steps, [str(count) for count in steps])
    few.set_xticks([], minor=True)
    style.save(fig, path)
