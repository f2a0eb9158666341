"""Figures: linear fields, agreement of the parts of drawn images, and generated images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from experiments.common import figures as style
from experiments.common.run import Run
from experiments.regions import gaussian
from experiments.regions.images import CORRELATION, DISPLACEMENT
from experiments.regions.results import by_name

COLORS = {
    gaussian.SCORE: style.REFERENCE,
    gaussian.FLUX: style.FLUX,
    gaussian.DSM: style.SCORE_MATCHING,
    "flux, full": "#56B4E9",
    "score matching, full": style.ACCENT,
    "exact score": style.DATA,
    "exact score, masked": style.VIOLATING,
}


def draw_gaussian(path: Path, run: Run) -> None:
    """Draw correlation kept by linear fields over σ, size of the fields, and W2 of samples over the steps."""
    fig, panels = style.new_figure(9.0, 2.8, 1, 3)
    for name in gaussian.FIELDS:
        rows = [row for row in run.rows("stationary") if row["field"] == name]
        sigmas = [row["sigma"] for row in rows]
        look = {"color": COLORS[name], "marker": "o", "ms": 3, "label": name}
        panels[0].plot(sigmas, [row["correlation"] for row in rows], **look)
        panels[1].plot(sigmas, [row["size"] for row in rows], **look)
        rows = [row for row in run.rows("generated") if row["field"] == name]
        panels[2].plot([row["steps"] for row in rows], [row["w2"] for row in rows], **look)
    panels[0].set(xscale="log", xlabel="σ", ylabel="correlation that the field keeps")
    panels[1].set(xscale="log", xlabel="σ", ylabel="σ × size of the field")
    panels[2].set(xscale="log", yscale="log", xlabel="steps of the sampler", ylabel="W2 of samples to the data")
    panels[0].legend(fontsize=7)
    style.save(fig, path)


def draw_agreement(path: Path, run: Run) -> None:
    """Draw correlation and displacement of the parts of each model, one dot per seed, beside the truth."""
    fig, panels = style.new_figure(10.5, 2.6, 1, 2)
    for axes, column, truth in zip(panels, ("correlation", "displacement"), (CORRELATION, DISPLACEMENT), strict=True):
        found = by_name(run, column)
        for place, (name, values) in enumerate(found.items()):
            axes.bar(place, statistics.mean(values), color=COLORS[name], alpha=0.6)
            axes.plot([place] * len(values), values, ".", color="black", ms=4)
        axes.axhline(truth, color="black", ls=":", lw=1)
        axes.set_xticks(
            range(len(found)),
            [name.replace(" matching", "\nmatching").replace(", ", "\n") for name in found],
            fontsize=7,
        )
    panels[0].set_ylabel("correlation of the centers")
    panels[1].set_ylabel("displacement / pixels")
    style.save(fig, path)


def draw_images(path: Path, shown: Mapping[str, Tensor]) -> None:
    """Draw images of both parts in a row per model.

    Args:
        path: file to write.
        shown: `[n, 2, 8, 8]` by name.
    """
    fig, rows = style.new_figure(8.0, 0.42 * len(shown), len(shown), 1)
    for axes, (name, images) in zip(rows, shown.items(), strict=True):
        thin, wide = torch.full((images.shape[2], 1), 0.5), torch.ones(images.shape[2], 2)
        strip = [part for left, right in images.float() for part in (left, thin, right, wide)]
        axes.imshow(torch.cat(strip[:-1], 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=7)
    style.save(fig, path)
