"""Figures: derivatives over noise levels, quality, and errors of the second-derivative methods."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.architectures.networks import ARCHITECTURES
from experiments.architectures.precision import NETWORK_METHODS, PRECISIONS, column
from experiments.architectures.training import OBJECTIVES
from experiments.common import figures as style
from experiments.common.objectives import COLORS, FLUX
from experiments.common.run import Run

LOOKS = (style.DATA, style.FLUX, style.PRESERVING, style.SCORE_MATCHING, style.ACCENT, style.VIOLATING)
OF_ARCHITECTURE = dict(zip(ARCHITECTURES, LOOKS, strict=True))
PANELS = {
    "error": "error of the Jacobian",
    "change": "change under a tiny move",
    "second_error": "error of ∇(∇·f)",
    "residual": "gradient of the residual",
}
OF_METHOD = dict(zip(NETWORK_METHODS, (style.FLUX, style.PRESERVING, style.SCORE_MATCHING), strict=True))


def by_level(run: Run, kind: str, name: str, architecture: str, objective: str = FLUX) -> dict[float, float]:
    """Return the mean of a column over the seeds by noise level."""
    return {
        sigma: statistics.mean(run.by_seed(kind, name, architecture=architecture, objective=objective, sigma=sigma))
        for sigma in run.config.levels
    }


def draw_derivatives(path: Path, run: Run) -> None:
    """Draw first and second derivatives of the fields of Flux Matching over σ."""
    fig, panels = style.new_figure(11.0, 2.8, 1, len(PANELS))
    for axes, (name, text) in zip(panels, PANELS.items(), strict=True):
        for architecture, color in OF_ARCHITECTURE.items():
            found = by_level(run, "derivatives", name, architecture)
            axes.plot(list(found), list(found.values()), color=color, marker="o", ms=3, label=architecture)
        if name == "change":
            exact = by_level(run, "derivatives", "exact_change", next(iter(ARCHITECTURES)))
            axes.plot(list(exact), list(exact.values()), color="black", ls=":", label="exact score")
        axes.set(xscale="log", yscale="log", xlabel="σ")
        axes.set_title(text, fontsize=9)
        axes.set_xticks(run.config.levels, [str(sigma) for sigma in run.config.levels])
        axes.set_xticks([], minor=True)
    panels[1].legend(fontsize=6)
    style.save(fig, path)


def draw_quality(path: Path, run: Run) -> None:
    """Draw W2 of the pixels and the gradient of the residual by architecture, for both objectives."""
    fig, panels = style.new_figure(10.5, 3.0, 1, 2)
    for axes, (kind, name) in zip(panels, (("model", "pixels"), ("derivatives", "residual")), strict=True):
        for shift, objective in zip((-0.2, 0.2), OBJECTIVES, strict=True):
            for place, architecture in enumerate(ARCHITECTURES):
                known: dict[str, Any] = {"architecture": architecture, "objective": objective}
                values = _by_seed(run, kind, name, known)
                label = objective if not place else None
                axes.bar(place + shift, statistics.mean(values), 0.38, color=COLORS[objective], alpha=0.6, label=label)
                axes.plot([place + shift] * len(values), values, ".", color="black", ms=4)
        axes.set_xticks(range(len(ARCHITECTURES)), [name.replace(", ", ",\n") for name in ARCHITECTURES], fontsize=7)
    floor = statistics.mean(run.by_seed("exact", "pixels", name="exact score"))
    panels[0].axhline(floor, color="black", ls=":", lw=1, label="exact score")
    panels[0].set_ylabel("W2 of the pixels")
    panels[1].set_ylabel("gradient of the residual")
    panels[0].legend(fontsize=7)
    style.save(fig, path)


def _by_seed(run: Run, kind: str, name: str, known: dict[str, Any]) -> list[float]:
    return [
        statistics.mean(row[name] for row in run.rows(kind) if known.items() <= row.items() and row["seed"] == seed)
        for seed in range(run.config.seeds)
    ]


def draw_methods(path: Path, run: Run) -> None:
    """Draw errors of the methods by architecture in each precision, one dot per seed and noise level."""
    fig, panels = style.new_figure(9.0, 3.0, 1, 2, sharey=True)
    for axes, precision in zip(panels, PRECISIONS, strict=True):
        for place, architecture in enumerate(ARCHITECTURES):
            rows = [r for r in run.rows("method") if (r["architecture"], r["objective"]) == (architecture, FLUX)]
            for shift, (method, color) in zip((-0.2, 0.0, 0.2), OF_METHOD.items(), strict=True):
                values = [row[column(method, precision)] for row in rows]
                values = [value for value in values if value is not None]
                label = method.replace("_", " ") if place == 1 else None
                axes.plot([place + shift] * len(values), values, ".", color=color, ms=4, label=label)
            noise = statistics.mean(row["probe"] for row in rows)
            axes.plot([place - 0.4, place + 0.4], [noise, noise], color="black", ls=":", lw=1)
        axes.set_xticks(range(len(ARCHITECTURES)), [name.replace(", ", ",\n") for name in ARCHITECTURES], fontsize=7)
        axes.set_yscale("log")
        axes.set_title(precision, fontsize=9)
    panels[0].set_ylabel("relative error")
    panels[1].legend(fontsize=7, loc="lower right")
    style.save(fig, path)
