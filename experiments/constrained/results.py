"""Comparison of the measurements with what is claimed about penalties at the boundary."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.constrained.domains import PROBLEMS
from experiments.constrained.exact import EXACT_FIELDS, EXACT_SCORE, OUTWARD, PROBLEM
from experiments.constrained.measure import PLAIN, PROJECTED, REFLECTED
from experiments.constrained.training import (
    FLUX,
    FLUX_PENALTY,
    SCORE,
    SCORE_PENALTY,
    START,
    START_PENALTY,
    VARIANTS,
    variants,
)

# Rows of the tables: field and sampler.
METHODS = {
    **{name: (name, PLAIN) for name in VARIANTS},
    "score, reflected": (SCORE, REFLECTED),
    "score, projected": (SCORE, PROJECTED),
}
PENALIZED = ((START, START_PENALTY), (FLUX, FLUX_PENALTY), (SCORE, SCORE_PENALTY))


def values(run: Run, problem: str, method: str, step: float, column: str) -> list[float]:
    """Return one column of the rows "sampled" by seed, empty if the method was not run on this problem."""
    field, sampler = METHODS[method]
    found: list[float] = run.by_seed("sampled", column, problem=problem, field=field, sampler=sampler, step=step)
    return found


def by_step(run: Run, problem: str, method: str, column: str) -> dict[float, list[float]]:
    """Return such values by step size."""
    found = {step: values(run, problem, method, step, column) for step in run.config.step_sizes}
    return {step: value for step, value in found.items() if value}


def exact_by_step(run: Run, field: str, column: str) -> dict[float, list[float]]:
    """Return a column of the rows "exact field" by step size."""
    return {step: run.by_seed("exact field", column, field=field, step=step) for step in run.config.step_sizes}


def exact(run: Run, problem: str) -> dict[str, Any]:
    """Return the row "exact" of a problem."""
    (row,) = (row for row in run.rows("exact") if row["problem"] == problem)
    return row


def results(run: Run) -> list[Result]:
    """Compare with the criteria: exact fields, penalties, then every method on every problem."""
    problems = run.config.problems
    return [
        *(of_exact_fields(run) if PROBLEM in problems else []),
        *(line for problem in problems for line in of_penalties(run, problem)),
        *(line for problem in problems for line in of_problem(run, problem)),
    ]


def of_exact_fields(run: Run) -> list[Result]:
    """Lines about fields that leave p_σ in place exactly."""
    found = {name: exact_by_step(run, name, "invalid") for name in EXACT_FIELDS}
    flows = {name: run.by_seed("exact field", "mean", field=name)[0] for name in EXACT_FIELDS}
    step = run.config.step_sizes[-1]
    largest = {name: statistics.mean(shares[step]) for name, shares in found.items()}
    return [
        *(
            Result(f"box, {name}: invalid points in % at steps of {', '.join(map(str, shares))} σ²", _percent(shares))
            for name, shares in found.items()
        ),
        Result(
            f"box: invalid points at steps of {step} σ²: {OUTWARD} over {EXACT_SCORE}",
            f"{largest[OUTWARD] / largest[EXACT_SCORE]:.2f}",
            "theory: above 1",
            largest[OUTWARD] > largest[EXACT_SCORE],
        ),
        Result(
            f"box: mean of σ f·n over the boundary: {' / '.join(EXACT_FIELDS)}",
            " / ".join(f"{value:.3f}" for value in flows.values()),
            "theory: equal",
            max(flows.values()) - min(flows.values()) < 0.02,
        ),
    ]


def of_penalties(run: Run, problem: str) -> list[Result]:
    """Lines about what the penalty changes on one problem, at the largest step size."""
    step, lines = run.config.step_sizes[-1], []
    for before, after in PENALIZED:
        if before not in variants(problem):
            continue
        share = [values(run, problem, name, step, "invalid") for name in (before, after)]
        distance = [values(run, problem, name, step, "valid") for name in (before, after)]
        lines.append(
            Result(
                f"{problem}: {before} → {after}: invalid points in % at steps of {step} σ²; distance of valid ones",
                f"{' → '.join(spread([100 * v for v in s], '.1f') for s in share)}; "
                f"{' → '.join(spread(d, '.2f') for d in distance)}",
                "criterion: fewer" if before != SCORE else "–",
                statistics.mean(share[1]) < statistics.mean(share[0]) if before != SCORE else None,
            )
        )
    return lines


def of_problem(run: Run, problem: str) -> list[Result]:
    """Lines of one problem: exact samples, then every method."""
    truth, step = exact(run, problem), run.config.step_sizes[0]
    lines = [
        Result(
            f"{problem}: exact samples of p_σ: invalid; distance of all, of valid points, of fresh data, in σ; "
            f"effective centers of {run.config.batch}",
            f"{truth['invalid']:.1%}; {truth['all']:.2f}, {truth['valid']:.2f}, {truth['floor']:.2f}; "
            f"{truth['centers']:.1f}",
        )
    ]
    for method in METHODS:
        shares = by_step(run, problem, method, "invalid")
        if not shares:
            continue
        whole, valid = (spread(values(run, problem, method, step, column), ".2f") for column in ("all", "valid"))
        lines.append(
            Result(
                f"{problem}, {method}: invalid points in % by step size; distance of all, of valid points at the first",
                f"{_percent(shares)}; {whole}, {valid}",
            )
        )
    return [*lines, *of_endings(run, problem), *of_boundary(run, problem)]


def of_endings(run: Run, problem: str) -> list[Result]:
    """Lines about the points x + σ² f(x), which the score puts at the mean of the data given x."""
    step = run.config.step_sizes[0]
    lines = []
    for method in variants(problem):
        invalid, valid = (values(run, problem, method, step, f"denoised {column}") for column in ("invalid", "valid"))
        lines.append(
            Result(
                f"{problem}, {method}, denoised at the end: invalid points in %; distance of valid ones",
                f"{spread([100 * value for value in invalid], '.1f')}; {spread(valid, '.2f')}",
            )
        )
    return lines


def of_boundary(run: Run, problem: str) -> list[Result]:
    """Lines about the flow through the boundary of the plane."""
    if PROBLEMS[problem].domain.dim != 2:
        return []
    rows = {name: run.by_seed("boundary", "mean", problem=problem, field=name) for name in variants(problem)}
    outward = {name: run.by_seed("boundary", "outward", problem=problem, field=name) for name in variants(problem)}
    score = run.by_seed("boundary", "score_mean", problem=problem, field=SCORE)[0]
    return [
        Result(
            f"{problem}, {name}: mean of σ f·n over the boundary; share of it where f points outward in %",
            f"{spread(rows[name], '.2f')}; {spread([100 * value for value in outward[name]], '.1f')}",
            f"score of the data: {score:.2f}",
        )
        for name in rows
    ]


def _percent(shares: dict[float, list[float]]) -> str:
    return ", ".join(f"{100 * statistics.mean(value):.1f}" for value in shares.values())
