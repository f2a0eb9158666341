"""Loss curves, and distances of samples, of both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.common import figures as style

Curves = list[list[float]]  # by seed and window
COLOURS = (style.DATA, style.FLUX)


def draw_curves(path: Path, curves: Mapping[str, Mapping[str, Curves]], iterations: Mapping[str, int]) -> None:
    """Mean over seeds and a band of one standard deviation, a panel a problem."""
    fig, axes = style.new_figure(3.3 * len(curves), 2.8, 1, len(curves), squeeze=False)
    for panel, (problem, by_way) in zip(axes[0], curves.items(), strict=True):
        for (way, found), colour, line in zip(by_way.items(), COLOURS, ("-", "--"), strict=True):
            values = np.array(found)
            at = (np.arange(values.shape[1]) + 0.5) * iterations[problem] / values.shape[1]
            mean, std = values.mean(0), values.std(0, ddof=1)
            panel.plot(at, mean, line, color=colour, label=way)
            panel.fill_between(at, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        # At random weights the loss at the smallest σ is millions; later it is a few units, of either sign.
        panel.set(title=problem, xlabel="iteration", yscale="symlog")
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend()
    style.save(fig, path)


def draw_distances(path: Path, distances: Mapping[str, Mapping[str, list[float]]], floors: Mapping[str, float]) -> None:
    """W2 of every training, those of one seed joined, and that of two samples of the data."""
    fig, axes = style.new_figure(3.0 * len(distances), 2.8, 1, len(distances), squeeze=False)
    for panel, (problem, by_way) in zip(axes[0], distances.items(), strict=True):
        for pair in zip(*by_way.values(), strict=True):
            panel.plot(range(len(pair)), pair, "o-", color=style.FLUX, alpha=0.6, markersize=4)
        panel.axhline(floors[problem], color=style.REFERENCE, ls=":", label="two samples of the data")
        panel.set(title=problem, xticks=range(len(by_way)), xlim=(-0.4, len(by_way) - 0.6))
        panel.set_xticklabels(by_way)
    axes[0, 0].set_ylabel("W2 to new data")
    axes[0, 0].legend()
    style.save(fig, path)
