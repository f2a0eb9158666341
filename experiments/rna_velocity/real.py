"""Real cells: every method fits a data set, is measured, drawn, and compared with its controls and the paper."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.common.results import Figure, Result, spread
from experiments.common.run import Run
from experiments.rna_velocity import figures, fits
from experiments.rna_velocity.datasets import DATASETS, load, preprocess, subsample
from fluxmatching.velocity import SharedFlowOptions, velocity_evidence

PROJECTION_TITLES = {"plain": "as they are", "root": "square roots", "published": "the paper's convention"}
# Name of the paper's numbers of each method.
PAPER_NAMES = {fits.PAPER: "flux", f"{fits.SCVELO}dynamical": "dynamical"}
DRAWN = (*fits.METHODS["shared_flow"], fits.PAPER, fits.CIRCULATING, f"{fits.SCVELO}dynamical", fits.STORED)


def methods(run: Run, name: str) -> list[str]:
    """Return the methods for a data set; one that has stored velocities is compared with those instead of scVelo."""
    chosen = fits.methods(run)
    if DATASETS[name].fitted:
        return [fits.STORED, *(method for method in chosen if not method.startswith(fits.SCVELO))]
    return chosen


def fit_all(run: Run, name: str) -> None:
    """Fit, measure, draw and log the methods that are not yet in the run's rows."""
    dataset = DATASETS[name]
    planned = [
        (method, seed)
        for method in methods(run, name)
        for seed in range(run.config.seeds if method in fits.DEPEND_ON_SEED else 1)
    ]
    done = {(row["method"], row["seed"]) for row in run.rows("fit") if row["dataset"] == name}
    missing = [pair for pair in planned if pair not in done]
    tested = run.config.permutations == 0 or fits.SHARED not in methods(run, name)
    tested = tested or any(row["dataset"] == name for row in run.rows("evidence"))
    if tested and not missing:
        return
    prepared = subsample(load(name), run.config.cells, run.seed)
    if dataset.fitted:
        prepared.layers[fits.STORED] = prepared.layers["velocity"]
        prepared.var[fits.STORED] = prepared.var["velocity_genes"]
    else:
        with fits.quiet():
            preprocess(prepared, dataset, run.config.genes, run.seed)
    for method, seed in run.bar(missing, name):
        adata = prepared.copy()
        seconds = fits.fit(run, adata, method, run.seed + seed)
        judged = fits.judge(adata, dataset)
        if seed == 0 and method in DRAWN:
            figures.draw_velocity(picture(run, name, method), adata, dataset.clusters, f"{name}, {method}")
            if method == fits.SHARED:
                adata.var.to_csv(run.out / f"{slug(name, method)}-genes.csv")
        fits.log(run, judged, {"dataset": name, "method": method, "seed": seed}, seconds)
    if not tested:
        options = SharedFlowOptions(seed=run.seed)
        found = velocity_evidence(
            prepared, permutations=run.config.permutations, options=options, progress=run.progress
        )
        run.log(
            kind="evidence", dataset=name, statistic=found.statistic, control=found.control, gain=found.gain,
            gain_error=found.gain_error, least_permuted=min(found.permuted), largest_permuted=max(found.permuted),
            p_value=found.p_value, genes=found.genes, applies=found.applies,
        )  # fmt: skip


def slug(name: str, method: str) -> str:
    return f"{name}-{method}".replace(" ", "-")


def picture(run: Run, name: str, method: str) -> Path:
    return run.figure(slug(name, method))


def shown(run: Run, name: str) -> list[Figure]:
    """All figures of a data set; the figure of the measures is drawn again."""
    bars = run.figure(f"{name}-measures")
    panels: dict[str, dict[str, list[float]]] = {}
    for key, text in PROJECTION_TITLES.items():
        for what in ("cells", "edges"):
            column = f"over_{what}_{key}"
            panels[f"CBC over {what}, {text}"] = {
                method: run.by_seed("fit", column, dataset=name, method=method) for method in methods(run, name)
            }
    figures.draw_measures(bars, panels)
    found = [Figure(bars, f"{name}: cross-boundary correctness by method and control, one point per seed.")]
    for method in methods(run, name):
        if method in DRAWN:
            uncertain = ", and the spread of directions over a bootstrap of genes: 0 is certain, 1 arbitrary"
            text = f"{name}: velocities by {method}{uncertain if method == fits.SHARED else ''}."
            found.append(Figure(picture(run, name, method), text))
    return found


def results(run: Run, name: str) -> list[Result]:
    """Lines of the summary: CBC by each convention, consistency and time of every method."""
    lines = [_evidence(name, row) for row in run.rows("evidence") if row["dataset"] == name]
    names = methods(run, name)
    controls = [method for method in names if method in fits.CONTROLS]
    for method in names:
        if method in controls:
            continue
        beside = controls if method == fits.SHARED else []
        paper = DATASETS[name].paper.get(PAPER_NAMES.get(method, ""))
        for key, text in PROJECTION_TITLES.items():
            columns = [f"over_{what}_{key}" for what in ("cells", "edges")]
            lines.append(
                Result(
                    f"{name}, {method}: CBC over cells; over edges; {text}{fits.BRACKETS if beside else ''}",
                    "; ".join(_with_controls(run, name, [method, *beside], column) for column in columns),
                    str(paper[0]) if paper is not None and key == _paper_convention(method) else "–",
                    _beats(run, name, method, beside, columns) if beside else None,
                )
            )
        lines.append(_consistency(run, name, method, beside, None if paper is None else paper[1]))
        if DATASETS[name].fitted:
            lines.append(
                Result(
                    f"{name}, {method}: cosine with the stored velocities, mean over genes",
                    _with_controls(run, name, [method, *beside], "agreement"),
                    "1 if identical",
                )
            )
    return lines


def _evidence(name: str, row: dict[str, Any]) -> Result:
    """The line of the test of whether velocity applies."""
    return Result(
        f"{name}: does velocity apply? partial correlation of unspliced counts with the flow of other genes",
        f"{row['statistic']:.3f} ({row['genes']} genes); permuted counts {row['least_permuted']:.3f} to "
        f"{row['largest_permuted']:.3f}, p = {row['p_value']:.2g}; without unspliced {row['control']:.3f} (gain "
        f"{row['gain']:.3f} ± {row['gain_error']:.3f})",
        "–",
        bool(row["applies"]),
    )


def _paper_convention(method: str) -> str:
    """The projection of the paper's number: its program takes roots, but not for scVelo's dynamical model."""
    return "plain" if method.startswith(fits.SCVELO) else "published"


def _mean(run: Run, name: str, method: str, column: str) -> float:
    return float(statistics.mean(run.by_seed("fit", column, dataset=name, method=method)))


def _beats(run: Run, name: str, method: str, controls: list[str], columns: list[str]) -> bool:
    """Check whether a method is ahead of every control in every column."""
    return all(
        _mean(run, name, method, column) > _mean(run, name, control, column)
        for control in controls
        for column in columns
    )


def _with_controls(run: Run, name: str, methods: list[str], column: str) -> str:
    """Format the first method's values, and the means of the others in brackets."""
    own = run.by_seed("fit", column, dataset=name, method=methods[0])
    beside = [f"{_mean(run, name, method, column):.3f}" for method in methods[1:]]
    return spread(own) + (f" [{', '.join(beside)}]" if beside else "")


def _consistency(run: Run, name: str, method: str, beside: list[str], paper: float | None) -> Result:
    """The line of consistency by both conventions, spread and time; the paper's claim is checked for its own method."""
    found = [
        _with_controls(run, name, [method, *beside], column) for column in ("consistency", "published_consistency")
    ]
    uncertain = run.by_seed("fit", "spread", dataset=name, method=method)
    stated = f"; spread of direction {spread(uncertain)}" if uncertain else ""
    seconds = statistics.median(run.by_seed("fit", "seconds", dataset=name, method=method))
    checked = paper is not None and method == fits.PAPER
    passed = None
    if checked and paper is not None:
        passed = round(_mean(run, name, method, "published_consistency"), 2) >= round(paper, 2)
    return Result(
        f"{name}, {method}: consistency; the paper's",
        f"{'; '.join(found)}{stated}; {seconds:.1f} s",
        "–" if paper is None else f"{paper}{' (criterion: at least that, to two digits)' if checked else ''}",
        passed,
    )
