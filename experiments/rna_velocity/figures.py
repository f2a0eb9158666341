"""Figures: streams and uncertainty on the embedding, methods against controls, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common import figures as style

if TYPE_CHECKING:
    from anndata import AnnData

GRID = 30  # points of the streams' grid along each axis
SMOOTHING = 0.025  # standard deviation of the streams' weights, as a fraction of the embedding's width
LEAST_CELLS = 1.0  # sum of weights that a grid point needs for a stream

Panels = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def color(method: str, number: int) -> str:
    """Color of a method: controls are gray."""
    return style.REFERENCE if method.startswith("control") else style.CYCLE[number % len(style.CYCLE)]


def draw_velocity(path: Path, adata: AnnData, clusters: str, title: str) -> None:
    """Draw streams of `obsm["velocity_umap"]` over the cells by cluster, and the uncertainty where there is one."""
    uncertain = "velocity_spread" in adata.obs
    fig, panels = style.new_figure(10.4 if uncertain else 5.2, 4.2, 1, 1 + uncertain, squeeze=False)
    draw_stream(panels[0, 0], adata, clusters, title)
    if uncertain:
        draw_spread(fig, panels[0, 1], adata)
    style.save(fig, path)


def draw_stream(axes: Any, adata: AnnData, clusters: str, title: str) -> None:
    """Draw cells and streams on given axes; names of clusters stand at their medians."""
    positions = np.asarray(adata.obsm["X_umap"], float)[:, :2]
    labels = np.asarray(adata.obs[clusters]).astype(str)
    for number, name in enumerate(sorted(set(labels))):
        chosen = labels == name
        axes.scatter(*positions[chosen].T, s=4, lw=0, alpha=0.5, color=f"C{number % 10}")
        axes.text(*np.median(positions[chosen], 0), name, fontsize=7, weight="bold", ha="center", zorder=5)
    x, y, flow = on_grid(positions, np.asarray(adata.obsm["velocity_umap"], float))
    axes.streamplot(x, y, flow[..., 0], flow[..., 1], color=style.DATA, density=1.2, linewidth=0.8, arrowsize=0.8)
    axes.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    low, high = positions.min(0), positions.max(0)
    edge = 0.05 * (high - low)
    axes.set(xlim=(low[0] - edge[0], high[0] + edge[0]), ylim=(low[1] - edge[1], high[1] + edge[1]))


def on_grid(positions: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average vectors about the points of a grid with Gaussian weights; NaN where there are few cells.

    Args:
        positions, vectors: `[cells, 2]`.

    Returns:
        The two axes of the grid, and the averages `[GRID, GRID, 2]`, y first, as `streamplot` takes them.
    """
    low, high = positions.min(0), positions.max(0)
    x, y = (np.linspace(low[k], high[k], GRID) for k in range(2))
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    scaled = (points[:, None] - positions) / (SMOOTHING * (high - low))
    weights = np.exp(-0.5 * (scaled**2).sum(-1))
    total = weights.sum(1, keepdims=True)
    flow = np.where(total > LEAST_CELLS, weights @ np.nan_to_num(vectors) / np.maximum(total, 1e-30), np.nan)
    return x, y, flow.reshape(GRID, GRID, 2)


def draw_spread(fig: Any, axes: Any, adata: AnnData) -> None:
    """Draw the spread of directions on given axes."""
    values = adata.obs["velocity_spread"].to_numpy()
    order = np.argsort(values)
    positions = np.asarray(adata.obsm["X_umap"])[order, :2]
    top = float(np.nanpercentile(values, 99))
    points = axes.scatter(*positions.T, c=values[order], s=4, lw=0, cmap=style.SEQUENTIAL, vmin=0, vmax=top)
    fig.colorbar(points, ax=axes, label="spread of the direction")
    axes.set(title="uncertainty", xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")


def draw_measures(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw one panel per measure and one bar per method, with one point per seed."""
    rows = -(-len(panels) // 2)
    methods = list(next(iter(panels.values())))
    fig, axes = style.new_figure(9.0, (0.6 + 0.25 * len(methods)) * rows, rows, 2, squeeze=False, sharey=True)
    for panel, (measure, by_method) in zip(axes.flat, panels.items(), strict=False):
        for height, (method, found) in enumerate(by_method.items()):
            panel.barh(height, np.mean(found), color=color(method, height), alpha=0.6)
            panel.plot(found, [height] * len(found), ".", color=style.DATA, ms=4)
        panel.axvline(0, color=style.DATA, lw=0.8)
        panel.set(title=measure, yticks=range(len(methods)), yticklabels=methods)
    axes.flat[0].invert_yaxis()
    style.save(fig, path)


def draw_simulated(path: Path, problems: Sequence[str], panels: Panels) -> None:
    """Draw one panel per measure, with one group of bars per problem: methods and controls, one point per seed.

    Args:
        path: file of the figure.
        problems: names of the groups.
        panels: values by measure, method, problem and seed.
    """
    fig, axes = style.new_figure(10.0, 2.0 * len(panels), len(panels), 1, squeeze=False, sharex=True)
    for panel, (measure, by_method) in zip(axes.flat, panels.items(), strict=True):
        width = 0.8 / len(by_method)
        for number, (method, by_problem) in enumerate(by_method.items()):
            places = np.arange(len(problems)) + (number - (len(by_method) - 1) / 2) * width
            hatch = "//" if method.endswith("permuted unspliced") else None
            means = [np.mean(found) if len(found) else np.nan for found in by_problem]
            label = method if panel is axes.flat[0] else None
            panel.bar(places, means, width, color=color(method, number), hatch=hatch, alpha=0.7, label=label)
            for place, found in zip(places, by_problem, strict=True):
                panel.plot([place] * len(found), found, ".", color=style.DATA, ms=3)
        panel.axhline(0, color=style.DATA, lw=0.8)
        panel.set(ylabel=measure)
    axes.flat[-1].set_xticks(range(len(problems)), problems, rotation=20, ha="right")
    fig.legend(loc="outside upper center", ncols=4)
    style.save(fig, path)


def draw_calibration(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw true errors against stated spreads, one color per problem, with the line of equality."""
    fig, axes = style.new_figure(6.4, 4.2)
    markers = "osD^v<>*"
    for number, (name, points) in enumerate(curves.items()):
        marker = markers[number % len(markers)]
        axes.plot(*zip(*points, strict=True), marker, ms=4, color=style.CYCLE[number % len(style.CYCLE)], label=name)
    ends = [point for points in curves.values() for pair in points for point in pair]
    least, largest = max(min(ends), 1e-4), max(ends)
    axes.plot([least, largest], [least, largest], color=style.DATA, lw=1)
    axes.set(
        xscale="log", yscale="log", xlabel="stated spread of the direction", ylabel="1 - cosine with the true flow"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    style.save(fig, path)
