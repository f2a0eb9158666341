"""Histograms over time, distance to the target against time, the probability current, and the residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from experiments.common import figures as style
from experiments.stationarity.checks import Bins
from experiments.stationarity.rollout import Rollout

FIELD_LOOK = {
    "flux": ("Flux Matching, causal field", style.FLUX, "-"),
    "dsm": ("score matching, causal field", style.SCORE_MATCHING, "-"),
    "causal": ("exact causal field", style.PRESERVING, "--"),
    "score": ("exact score", style.DATA, ":"),
}
SHADES = LinearSegmentedColormap.from_list("density", ["white", "#c6d7e8", "#7fa3c7"])
FAINT = 0.03  # of the largest current: weaker ones are not drawn, since an arrow's head would show them as strong
WINDOW = 4.0  # half the side of the panels of current and residual


def _image(ax: Any, bins: Bins, values: Tensor, **kw: Any) -> Any:
    """Show values `[count, count]` as an image, the first index along x_1."""
    extent = (-bins.limit, bins.limit, -bins.limit, bins.limit)
    ax.grid(False)
    return ax.imshow(values.T.numpy(), origin="lower", extent=extent, **kw)


def draw_histograms(
    path: Path, rollouts: Mapping[str, Rollout], target: Tensor, bins: Bins, times: Sequence[float]
) -> None:
    """Draw the histogram of the chains at some times, and the target, one row per field.

    Args:
        path: file to write.
        rollouts: long runs by field.
        target: exact probabilities of the bins, `[count² + 1]`.
        bins: bins of the histograms.
        times: times of the columns.
    """
    fig, axes = style.new_figure(
        2.1 * (len(times) + 1), 2.15 * len(rollouts) + 0.3, len(rollouts), len(times) + 1,
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    top = 1.15 * target[:-1].max().item()
    for row, (name, rollout) in zip(axes, rollouts.items(), strict=True):
        for ax, histogram in zip(row, [*(rollout.at(time) for time in times), target], strict=True):
            square = histogram[:-1].reshape(bins.count, bins.count)
            _image(ax, bins, square, cmap="viridis", vmin=0, vmax=top)
        row[0].set_ylabel(FIELD_LOOK[name][0].replace(", ", ",\n") + "\n$x_2$")
    for ax, title in zip(axes[0], [*(f"t = {time:g}" for time in times), "target"], strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$")
    style.save(fig, path)


def draw_distance(
    path: Path, distances: Mapping[str, tuple[Sequence[float], Sequence[float]]], exact: Sequence[float]
) -> None:
    """Draw the total-variation distance against time.

    Args:
        path: file to write.
        distances: (times, distances) by field.
        exact: distances of exact samples of the same size.
    """
    fig, ax = style.new_figure(6.4, 3.8)
    level = float(np.mean(exact))
    ax.axhspan(min(exact), max(exact), color=style.REFERENCE, alpha=0.5, lw=0, label="exact samples")
    ax.axhline(2 * level, color=style.REFERENCE, linestyle="--", linewidth=1, label="twice their mean")
    for name, (time, distance) in distances.items():
        label, color, line = FIELD_LOOK[name]
        ax.plot(time, distance, line, color=color, label=label)
    ax.set(xlabel="time $t$ of the Langevin dynamics", ylabel="total-variation distance to the target", yscale="log")
    ax.legend(loc="upper right", fontsize=8)
    style.save(fig, path)


def draw_current(path: Path, panels: Mapping[str, Tensor], density: Tensor, bins: Bins) -> None:
    """Draw streamlines of J over the density; their width is the length of J, on one scale for all panels.

    Currents below 3 % of the largest are left out.

    Args:
        path: file to write.
        panels: J by title, `[count, count, 2]`.
        density: density of the target in the bins, `[count, count]`.
        bins: bins of J.
    """
    fig, axes = style.new_figure(3.5 * len(panels), 3.7, 1, len(panels), sharex=True, sharey=True)
    centers = bins.centers().numpy()
    top = max(current.norm(dim=-1).max().item() for current in panels.values())
    for ax, (title, current) in zip(axes, panels.items(), strict=True):
        _image(ax, bins, density, cmap=SHADES)
        length = current.norm(dim=-1)
        weak = length < FAINT * top
        if not weak.all():
            shown = current.masked_fill(weak.unsqueeze(-1), torch.nan).numpy()
            ax.streamplot(
                centers, centers, shown[..., 0].T, shown[..., 1].T,
                density=1.3, linewidth=2.6 * length.T.numpy() / top, arrowsize=0.9, color="#1b263b",
            )  # fmt: skip
        ax.set(
            title=f"{title}\nlargest |J| = {length.max().item():.3f}",
            xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), xlabel="$x_1$", aspect="equal",
        )  # fmt: skip
    axes[0].set_ylabel("$x_2$")
    style.save(fig, path)


def draw_residual(path: Path, panels: Mapping[str, Tensor], bins: Bins) -> None:
    """Draw p r = ∇·(p (f - s)): red where the field would thin the target out, blue where it would pile it up.

    Args:
        path: file to write.
        panels: p r by title, `[count, count]`.
        bins: bins of the panels.
    """
    fig, axes = style.new_figure(3.3 * len(panels) + 0.6, 3.4, 1, len(panels), sharex=True, sharey=True)
    top = torch.stack(list(panels.values())).abs().max().item()
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        image = _image(ax, bins, values, cmap=style.DIVERGING, vmin=-top, vmax=top)
        ax.set(title=title, xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), xlabel="$x_1$")
    axes[0].set_ylabel("$x_2$")
    fig.colorbar(image, ax=axes, label="$p\\,r = \\nabla\\cdot(p\\,(f - s))$")
    style.save(fig, path)
