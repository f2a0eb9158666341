"""Figures: invalid points by step size, their price, and the fields in the plane."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.common import figures as style
from experiments.common.run import Run
from experiments.constrained.domains import PROBLEMS, Domain
from experiments.constrained.exact import EXACT_FIELDS, EXACT_SCORE, OUTWARD, TANGENTIAL
from experiments.constrained.results import METHODS, by_step, exact, exact_by_step, values
from experiments.constrained.training import FLUX, FLUX_PENALTY, SCORE, SCORE_PENALTY, START, START_PENALTY

COLORS = {
    SCORE: style.SCORE_MATCHING,
    SCORE_PENALTY: style.ACCENT,
    FLUX: style.FLUX,
    FLUX_PENALTY: style.PRESERVING,
    START: style.VIOLATING,
    START_PENALTY: "#56B4E9",
    "score, reflected": style.DATA,
    "score, projected": style.REFERENCE,
    EXACT_SCORE: style.SCORE_MATCHING,
    TANGENTIAL: style.PRESERVING,
    OUTWARD: style.VIOLATING,
}


def draw_steps(path: Path, run: Run) -> None:
    """Draw the share of invalid points, and below it the distance of valid points, over the step size."""
    problems = run.config.problems
    fig, panels = style.new_figure(2.6 * len(problems), 5.0, 2, len(problems), sharex=True, squeeze=False)
    for index, problem in enumerate(problems):
        for axes, column in zip(panels[:, index], ("invalid", "valid"), strict=True):
            for method in METHODS:
                _draw_method(axes, by_step(run, problem, method, column), method)
            axes.axhline(exact(run, problem)[column], color="black", lw=0.8, ls=":", label="exact samples of p_σ")
            axes.set_xscale("log")
        panels[0, index].set_title(problem)
        panels[1, index].set_xlabel("step size / σ²")
    panels[0, 0].set_ylabel("share of invalid points")
    panels[1, 0].set_ylabel("distance of valid points / σ")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    style.save(fig, path)


def _draw_method(axes: Any, found: Mapping[float, list[float]], method: str) -> None:
    """Draw means over the seeds, and the seeds as dots."""
    if not found:
        return
    steps = list(found)
    axes.plot(steps, [statistics.mean(v) for v in found.values()], color=COLORS[method], label=method)
    for step, value in found.items():
        axes.plot([step] * len(value), value, ".", color=COLORS[method], ms=3)


def draw_exact(path: Path, run: Run) -> None:
    """Draw invalid points, and the distance of valid ones, of the exact fields over the step size."""
    fig, panels = style.new_figure(6.4, 2.8, 1, 2)
    for axes, column in zip(panels, ("invalid", "valid"), strict=True):
        for name in EXACT_FIELDS:
            _draw_method(axes, exact_by_step(run, name, column), name)
        axes.axhline(exact(run, "box")[column], color="black", lw=0.8, ls=":", label="exact samples of p_σ")
        axes.set(xscale="log", xlabel="step size / σ²")
    panels[0].set_ylabel("share of invalid points")
    panels[1].set_ylabel("distance of valid points / σ")
    panels[0].legend(fontsize=7)
    style.save(fig, path)


def draw_price(path: Path, run: Run) -> None:
    """Draw distance of valid points over the share of invalid ones at the largest step size, one dot per seed."""
    problems = run.config.problems
    fig, panels = style.new_figure(2.6 * len(problems), 2.9, 1, len(problems), squeeze=False)
    step = run.config.step_sizes[-1]
    for axes, problem in zip(panels[0], problems, strict=True):
        for method in METHODS:
            share, distance = (values(run, problem, method, step, c) for c in ("invalid", "valid"))
            axes.plot(share, distance, "o", ms=4, color=COLORS[method], label=method)
        truth = exact(run, problem)
        axes.plot(truth["invalid"], truth["valid"], "k+", ms=9, label="exact samples of p_σ")
        axes.set_title(problem)
        axes.set_xlabel("share of invalid points")
    panels[0, 0].set_ylabel("distance of valid points / σ")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    style.save(fig, path)


def draw_fields(path: Path, fields: Mapping[tuple[str, str], Tensor], grids: Mapping[str, Tensor]) -> None:
    """Draw fields on the domains of the plane.

    Args:
        path: file to write.
        fields: σ f at the points of the grid, `[n, 2]`, by problem and variant.
        grids: points by problem, `[n, 2]`.
    """
    names = list(dict.fromkeys(name for _, name in fields))
    fig, panels = style.new_figure(2.1 * len(names), 2.2 * len(grids), len(grids), len(names), squeeze=False)
    for row, (problem, x) in zip(panels, grids.items(), strict=True):
        for axes, name in zip(row, names, strict=True):
            if (problem, name) not in fields:
                axes.set_axis_off()
                continue
            f, inside = fields[problem, name], PROBLEMS[problem].domain.inside(x)
            for part, color in ((inside, style.FLUX), (~inside, style.SCORE_MATCHING)):
                axes.quiver(*x[part].T, *f[part].T, color=color, angles="xy", scale=30, width=0.006)
            _draw_outline(axes, PROBLEMS[problem].domain)
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{problem}: {name}", fontsize=8)
    style.save(fig, path)


def _draw_outline(axes: Any, domain: Domain) -> None:
    """Draw the boundary as dots."""
    y, _ = domain.outline(480)
    axes.plot(*y.T, ".", color="black", ms=0.8)


def grid_around(problem: str, count: int = 15) -> Tensor:
    """Return a grid over the domain of the plane and 3σ around it, without points far from the domain, `[n, 2]`."""
    domain, sigma = PROBLEMS[problem].domain, PROBLEMS[problem].sigma
    y, _ = domain.outline(480)
    low, high = y.amin(0) - 3 * sigma, y.amax(0) + 3 * sigma
    x = torch.cartesian_prod(
        *(torch.linspace(float(a), float(b), count).double() for a, b in zip(low, high, strict=True))
    )
    return x[(x - domain.project(x)).norm(dim=-1) <= 3 * sigma].float()
