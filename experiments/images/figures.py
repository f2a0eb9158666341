"""Figures: grids of images, and the distance over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.common import figures as style
from experiments.common.objectives import COLORS


def draw_grids(path: Path, by_name: Mapping[str, Tensor], columns: int = 8) -> None:
    """Draw one panel per name with `columns` images per row; images are bytes `[n, 3, size, size]`."""
    fig, axes = style.new_figure(2.6 * len(by_name), 2.9, 1, len(by_name), squeeze=False)
    for panel, (name, images) in zip(axes[0], by_name.items(), strict=True):
        panel.imshow(tile(images, columns).numpy(), interpolation="nearest")
        panel.set_title(name)
        panel.set_axis_off()
    style.save(fig, path)


def draw_rows(path: Path, by_name: Mapping[str, Mapping[int, Tensor]], label: str, columns: int = 8) -> None:
    """Draw images from the same noise: one panel per name, one row per number (its meaning is `label`)."""
    rows = max(len(images) for images in by_name.values())
    fig, axes = style.new_figure(3.6 * len(by_name), 0.5 * rows + 0.6, 1, len(by_name), squeeze=False)
    for panel, (name, by_number) in zip(axes[0], by_name.items(), strict=True):
        images = torch.cat([found[:columns] for found in by_number.values()])
        panel.imshow(tile(images, columns).numpy(), interpolation="nearest")
        size = images.shape[-1] + 1
        panel.set_yticks([size * (k + 0.5) for k in range(len(by_number))], [str(number) for number in by_number])
        panel.set_xticks([])
        panel.grid(False)
        panel.set(title=name, ylabel=label)
    style.save(fig, path)


def draw_distance(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], floor: float) -> None:
    """Draw the Fréchet distance on random convolutions over the iterations, and that of real images."""
    fig, axes = style.new_figure(4.2, 3.0)
    for objective, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[objective], ms=4, label=objective)
    axes.axhline(floor, color=style.DATA, lw=0.8, ls="--", label="real images")
    axes.set(xlabel="iteration", ylabel="Fréchet distance, random convolutions", yscale="log")
    axes.legend()
    style.save(fig, path)


def tile(images: Tensor, columns: int) -> Tensor:
    """Arrange images in a grid with white lines: `[n, 3, h, w]` bytes to `[rows (h + 1), columns (w + 1), 3]`."""
    rows = -(-len(images) // columns)
    n, channels, height, width = images.shape
    padded = torch.full((rows * columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    padded[:n, :, :height, :width] = images
    grid = padded.reshape(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)
