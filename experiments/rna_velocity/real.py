"""Real cells: every method fits a data set, is evaluated, drawn, and compared with the paper's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.results import Figure, Result, spread
from experiments.common.run import Run
from experiments.rna_velocity import figures, fits
from experiments.rna_velocity.datasets import DATASETS, load, preprocess, subsample

if TYPE_CHECKING:
    from anndata import AnnData

# Genes with a known course in the pancreas; other data sets show the genes that vary most.
PORTRAITS = ("Cpe", "Nnat", "Sulf2", "Top2a", "Pyy", "Gnas")
COLUMNS = {
    f"CBC, mean over {what}, {title}": f"over_{what}_{key}"
    for key, title in (("plain", "velocities as they are"), ("root", "square roots"))
    for what in ("cells", "edges")
} | {"consistency": "consistency"}


def methods(run: Run, name: str) -> list[str]:
    others = [fits.STORED] if DATASETS[name].fitted else run.config.scvelo
    return [*others, *fits.FLUX_METHODS]


def fit_all(run: Run, name: str) -> None:
    """Fit, evaluate, draw and log the methods that are not yet in the run's rows."""
    dataset = DATASETS[name]
    several = (fits.FLUX, fits.CIRCULATING_FLUX)
    planned = [(m, seed) for m in methods(run, name) for seed in range(run.config.seeds if m in several else 1)]
    done = {(row["method"], row["seed"]) for row in run.rows("fit") if row["dataset"] == name}
    missing = [pair for pair in planned if pair not in done]
    if not missing:
        return
    prepared = subsample(load(name), run.config.cells, run.seed)
    if dataset.fitted:
        prepared.layers[fits.STORED] = prepared.layers["velocity"]
        prepared.var[fits.STORED] = prepared.var["velocity_genes"]
    else:
        with fits.quiet():
            preprocess(prepared, dataset, run.config.genes, run.seed)
    for method, seed in missing:
        adata = prepared.copy()
        seconds = fits.fit(run, adata, method, run.seed + seed)
        judged = fits.judge(adata, dataset)
        if seed == 0:
            with fits.quiet():
                figures.draw_stream(stream(run, name, method), adata, dataset.clusters, f"{name}, {method}")
            if method in several:
                figures.draw_portraits(portraits(run, name, method), adata, genes_to_show(adata), dataset.clusters)
                adata.var.to_csv(run.out / f"{slug(name, method)}-genes.csv")
        fits.log(run, judged, {"dataset": name, "method": method, "seed": seed}, seconds)


def slug(name: str, method: str) -> str:
    return f"{name}-{method}".replace(" ", "-")


def stream(run: Run, name: str, method: str) -> Path:
    return run.figure(f"{slug(name, method)}-stream")


def portraits(run: Run, name: str, method: str) -> Path:
    return run.figure(f"{slug(name, method)}-portraits")


def genes_to_show(adata: AnnData) -> list[str]:
    """Names of six genes: those with a known course if present, then those whose moments vary most."""
    known = [gene for gene in PORTRAITS if gene in adata.var_names]
    spread = np.asarray(adata.layers["Ms"]).std(0) * np.asarray(adata.layers["Mu"]).std(0)
    others = [gene for gene in adata.var_names[np.argsort(-spread)] if gene not in known]
    return (known + others)[:6]


def shown(run: Run, name: str) -> list[Figure]:
    """All figures of a data set; the figure of the metrics is drawn again."""
    metrics = run.figure(f"{name}-metrics")
    paper = {} if DATASETS[name].fitted else DATASETS[name].paper
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for title, column in COLUMNS.items():
        panels[title] = {
            method: run.by_seed("fit", column, dataset=name, method=method) for method in methods(run, name)
        }
        panels[title] |= {f"paper: {method}": [pair[column == "consistency"]] for method, pair in paper.items()}
    figures.draw_metrics(metrics, panels)
    return [
        Figure(
            metrics, f"{name}: the metrics; one point per seed, and the paper's numbers in every panel of their metric."
        ),
        *(Figure(stream(run, name, m), f"{name}: velocities by {m} on the embedding.") for m in methods(run, name)),
        *(
            Figure(portraits(run, name, m), f"{name}, {m}: single genes and the fitted fields du/dt, ds/dt as streams.")
            for m in (fits.FLUX, fits.CIRCULATING_FLUX)
        ),
    ]


def results(run: Run, name: str) -> list[Result]:
    """Lines of the summary: one for each method and metric of the paper."""
    lines: list[Result] = []
    for method in methods(run, name):
        paper = DATASETS[name].paper.get(method)
        values = {
            column: run.by_seed("fit", column, dataset=name, method=method) for column in (*COLUMNS.values(), "seconds")
        }
        lines.append(
            Result(
                f"{name}, {method}: CBC over cells / over edges; by square roots",
                f"{spread(values['over_cells_plain'])} / {spread(values['over_edges_plain'])}; "
                f"{spread(values['over_cells_root'])} / {spread(values['over_edges_root'])}",
                "–" if paper is None else f"{paper[0]} (the paper does not specify which)",
            )
        )
        checked = method == fits.FLUX and paper is not None
        lines.append(
            Result(
                f"{name}, {method}: consistency; time of a fit",
                f"{spread(values['consistency'])}; {statistics.median(values['seconds']):.0f} s",
                "–"
                if paper is None
                else f"{paper[1]}{' (criterion: at least that, to two digits)' if checked else ''}",
                round(statistics.mean(values["consistency"]), 2) >= round(paper[1], 2) if checked and paper else None,
            )
        )
        if DATASETS[name].fitted:
            lines.append(
                Result(
                    f"{name}, {method}: cosine with the stored velocities, mean over genes",
                    spread(run.by_seed("fit", "agreement", dataset=name, method=method)),
                    "1 if identical",
                )
            )
    return lines
