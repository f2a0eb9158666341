"""Grids of images and the distance over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.common import figures as style
from experiments.common.objectives import DSM, FAST, FLUX

COLOURS = {FLUX: style.FLUX, FAST: style.PRESERVING, DSM: style.SCORE_MATCHING}


def draw_grids(path: Path, by_name: Mapping[str, Tensor], columns: int = 8) -> None:
    """Images side by side, a panel of `columns` a row for each name; bytes `[n, 3, size, size]`."""
    fig, axes = style.new_figure(2.6 * len(by_name), 2.9, 1, len(by_name), squeeze=False)
    for panel, (name, images) in zip(axes[0], by_name.items(), strict=True):
        panel.imshow(tile(images, columns).numpy(), interpolation="nearest")
        panel.set_title(name)
        panel.set_axis_off()
    style.save(fig, path)


def draw_progress(path: Path, by_objective: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
    """Samples from the same noise at several points of the training, a row each, a panel an objective."""
    rows = max(len(stages) for stages in by_objective.values())
    fig, axes = style.new_figure(3.6 * len(by_objective), 0.5 * rows + 0.6, 1, len(by_objective), squeeze=False)
    for panel, (objective, stages) in zip(axes[0], by_objective.items(), strict=True):
        columns = min(len(images) for _, images in stages)
        panel.imshow(
            tile(torch.cat([images[:columns] for _, images in stages]), columns).numpy(), interpolation="nearest"
        )
        size = stages[0][1].shape[-1] + 1
        panel.set_yticks([size * (k + 0.5) for k in range(len(stages))], [f"{iteration}" for iteration, _ in stages])
        panel.set_xticks([])
        panel.grid(False)
        panel.set(title=objective, ylabel="iteration")
    style.save(fig, path)


def draw_distance(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], floor: float) -> None:
    """Fréchet distance on random convolutions over the iterations, and that of real images."""
    fig, axes = style.new_figure(4.2, 3.0)
    for objective, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[objective], ms=4, label=objective)
    axes.axhline(floor, color=style.DATA, lw=0.8, ls="--", label="real images")
    axes.set(xlabel="iteration", ylabel="Fréchet distance, random convolutions", yscale="log")
    axes.legend()
    style.save(fig, path)


def tile(images: Tensor, columns: int) -> Tensor:
    """One image of many: `[n, 3, h, w]` bytes to `[rows (h + 1), columns (w + 1), 3]`, white between them."""
    rows = -(-len(images) // columns)
    n, channels, height, width = images.shape
    padded = torch.full((rows * columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    padded[:n, :, :height, :width] = images
    grid = padded.reshape(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)
