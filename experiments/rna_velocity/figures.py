"""Figures: streams on the embedding, phase portraits with the fitted field, and the metrics beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.common import figures as style

if TYPE_CHECKING:
    from anndata import AnnData


def draw_stream(path: Path, adata: AnnData, clusters: str, title: str) -> None:
    """Draw scVelo's stream plot of `layers["velocity"]` on the embedding."""
    import scvelo as scv

    fig, axes = style.new_figure(5.0, 4.4)
    scv.pl.velocity_embedding_stream(adata, basis="umap", color=clusters, ax=axes, show=False, title=title)
    style.save(fig, path)


def draw_portraits(path: Path, adata: AnnData, genes: Sequence[str], clusters: str) -> None:
    """Draw unspliced against spliced abundance of single genes, colored by cluster, with the fitted field as streams.

    Args:
        path: file of the figure.
        adata: data after `flux_velocity`.
        genes: names of genes.
        clusters: column of obs with the clusters.
    """
    labels = np.asarray(adata.obs[clusters]).astype(str)
    names = sorted(set(labels))
    fig, axes = style.new_figure(9.0, 2.9 * -(-len(genes) // 3), -(-len(genes) // 3), 3, squeeze=False)
    for panel in axes.flat[len(genes) :]:
        panel.set_axis_off()
    for panel, gene in zip(axes.flat, genes, strict=False):
        index = adata.var_names.get_loc(gene)
        s, u = (np.asarray(adata.layers[key][:, index]).ravel() for key in ("Ms", "Mu"))
        for number, name in enumerate(names):
            chosen = labels == name
            panel.scatter(
                s[chosen],
                u[chosen],
                s=3,
                lw=0,
                alpha=0.6,
                color=f"C{number % 10}",
                label=name if gene == genes[0] else None,
            )
        a, b, c, beta, gamma, unit = (
            float(adata.var[f"velocity_{key}"].iloc[index]) for key in ("a", "b", "c", "beta", "gamma", "scale")
        )
        grid_s, grid_u = np.meshgrid(np.linspace(0, s.max(), 20), np.linspace(0, u.max(), 20))
        du = unit * np.logaddexp(0, (a * grid_u + b * grid_s) / unit + c) - beta * grid_u
        ds = beta * grid_u - gamma * grid_s
        panel.streamplot(grid_s, grid_u, ds, du, color=style.DATA, density=0.7, linewidth=0.6, arrowsize=0.7)
        panel.set(title=gene, xlabel="spliced", ylabel="unspliced")
    fig.legend(loc="outside lower center", ncols=4, markerscale=3)
    style.save(fig, path)


def draw_metrics(path: Path, values: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw one panel per metric and one row of points per method: its seeds, or the paper's number."""
    rows = -(-len(values) // 2)
    fig, axes = style.new_figure(9.0, 2.0 * rows, rows, 2, squeeze=False)
    for panel in axes.flat[len(values) :]:
        panel.set_axis_off()
    for panel, (metric, by_method) in zip(axes.flat, values.items(), strict=False):
        for height, (method, found) in enumerate(by_method.items()):
            panel.plot(found, [height] * len(found), "o", color=style.FLUX if "flux" in method.lower() else style.DATA)
        panel.set(title=metric, yticks=range(len(by_method)), ylim=(-0.5, len(by_method) - 0.5))
        panel.set_yticklabels(by_method)
    style.save(fig, path)


def draw_against_noise(path: Path, panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]) -> None:
    """Draw mean and standard deviation over seeds against the noise: one panel per metric, one line per method."""
    rows = len(panels) // 3
    fig, axes = style.new_figure(9.0, 2.4 * rows, rows, 3)
    for panel, (title, by_method) in zip(axes.flat, panels.items(), strict=True):
        for number, (method, by_noise) in enumerate(by_method.items()):
            means, errors = ([function(values) for values in by_noise.values()] for function in (np.mean, np.std))
            label = method if panel is axes.flat[0] else None
            panel.errorbar(
                list(by_noise), means, errors, color=style.CYCLE[number], capsize=2, marker="o", ms=3, label=label
            )
        panel.set(title=title, xlabel="noise")
    fig.legend(loc="outside lower center", ncols=3)
    style.save(fig, path)
