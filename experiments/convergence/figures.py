"""Loss curves, and distances of samples, of both methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.common import figures as style

Curves = list[list[float]]  # by seed and window
COLORS = (style.DATA, style.FLUX)


def draw_curves(path: Path, curves: Mapping[str, Mapping[str, Curves]], iterations: Mapping[str, int]) -> None:
    """Draw the mean over seeds and a band of one standard deviation, one panel per problem."""
    fig, axes = style.new_figure(3.3 * len(curves), 2.8, 1, len(curves), squeeze=False)
    for panel, (problem, by_method) in zip(axes[0], curves.items(), strict=True):
        for (method, found), color, line in zip(by_method.items(), COLORS, ("-", "--"), strict=True):
            values = np.array(found)
            at = (np.arange(values.shape[1]) + 0.5) * iterations[problem] / values.shape[1]
            mean, std = values.mean(0), values.std(0, ddof=1)
            panel.plot(at, mean, line, color=color, label=method)
            panel.fill_between(at, mean - std, mean + std, color=color, alpha=0.2, lw=0)
        # At random weights the loss at the smallest σ is millions; later it is a few units, of either sign.
        panel.set(title=problem, xlabel="iteration", yscale="symlog")
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend()
    style.save(fig, path)


def draw_distances(path: Path, distances: Mapping[str, Mapping[str, list[float]]], floors: Mapping[str, float]) -> None:
    """Draw W2 of every training, joined within a seed, and W2 of two samples of the data."""
    fig, axes = style.new_figure(3.0 * len(distances), 2.8, 1, len(distances), squeeze=False)
    for panel, (problem, by_method) in zip(axes[0], distances.items(), strict=True):
        for pair in zip(*by_method.values(), strict=True):
            panel.plot(range(len(pair)), pair, "o-", color=style.FLUX, alpha=0.6, markersize=4)
        panel.axhline(floors[problem], color=style.REFERENCE, ls=":", label="two samples of the data")
        panel.set(title=problem, xticks=range(len(by_method)), xlim=(-0.4, len(by_method) - 0.6))
        panel.set_xticklabels(by_method)
    axes[0, 0].set_ylabel("W2 to new data")
    axes[0, 0].legend()
    style.save(fig, path)
