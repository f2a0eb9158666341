"""Figures: distance against evaluations, and samples from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.common import figures as style


def draw_distances(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], floor: float) -> None:
    """Draw the Fréchet distance against the number of evaluations, one panel per solver.

    Args:
        path: file to write.
        panels: solver -> variant -> evaluations -> distance.
        floor: distance of held-out images.
    """
    fig, axes = style.new_figure(6.6, 3.0, 1, len(panels), sharey=True, squeeze=False)
    for panel, (solver, by_variant) in zip(axes[0], panels.items(), strict=True):
        for color, (name, found) in zip(style.CYCLE, by_variant.items(), strict=False):
            panel.plot(list(found), list(found.values()), "o-", ms=4, color=color, label=name)
        panel.axhline(floor, color=style.DATA, lw=0.8, ls="--", label="held-out images")
        panel.set(title=solver, xscale="log", yscale="log", xlabel="evaluations of the field")
        counts = sorted({count for found in by_variant.values() for count in found})
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xticks([], minor=True)
    axes[0, 0].set_ylabel("Fréchet distance, random convolutions")
    axes[0, 0].legend()
    style.save(fig, path)
