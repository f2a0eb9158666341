"""Comparison of the measurements with what is claimed about penalties at the boundary."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.constrained.domains import PROBLEMS
from experiments.constrained.measure import PLAIN, PROJECTED, REFLECTED
from experiments.constrained.training import (
    FLUX,
    FLUX_PENALTY,
    SCORE,
    SCORE_PENALTY,
    TURNING,
    TURNING_PENALTY,
    VARIANTS,
)

# Rows of the tables: field and sampler.
METHODS = {
    **{name: (name, PLAIN) for name in VARIANTS},
    "score, reflected": (SCORE, REFLECTED),
    "score, projected": (SCORE, PROJECTED),
}
PENALIZED = ((FLUX, FLUX_PENALTY), (TURNING, TURNING_PENALTY), (SCORE, SCORE_PENALTY))


def values(run: Run, problem: str, method: str, step: float, column: str) -> list[float]:
    """Return one column of the rows "sampled" by seed, empty if the method was not run on this problem."""
    field, sampler = METHODS[method]
    found: list[float] = run.by_seed("sampled", column, problem=problem, field=field, sampler=sampler, step=step)
    return found


def by_step(run: Run, problem: str, method: str, column: str) -> dict[float, list[float]]:
    """Return such values by step size."""
    found = {step: values(run, problem, method, step, column) for step in run.config.step_sizes}
    return {step: value for step, value in found.items() if value}


def exact(run: Run, problem: str) -> dict[str, Any]:
    """Return the row "exact" of a problem."""
    (row,) = (row for row in run.rows("exact") if row["problem"] == problem)
    return row


def results(run: Run) -> list[Result]:
    """Compare with the criteria, problem by problem."""
    lines = [line for problem in run.config.problems for line in of_problem(run, problem)]
    return [*of_claim(run), *lines]


def of_claim(run: Run) -> list[Result]:
    """Lines about the claim: what the penalty changes, over all problems and seeds, at every step size."""
    lines = []
    for before, after in PENALIZED:
        for column, what in (("invalid", "invalid points"), ("valid", "distance of valid points"), ("all", "distance")):
            changes = {step: change(run, before, after, step, column) for step in run.config.step_sizes}
            found = [f"{value:+.0%}" for value in changes.values()]
            criterion = column == "invalid" and before != SCORE
            lines.append(
                Result(
                    f"{what}: {after}, relative to that without penalty, at steps of "
                    f"{', '.join(map(str, changes))} σ², mean of problems and seeds",
                    ", ".join(found),
                    "criterion: below 0" if criterion else "–",
                    all(value < 0 for value in changes.values()) if criterion else None,
                )
            )
    return lines


def change(run: Run, before: str, after: str, step: float, column: str) -> float:
    """Average the relative change of a column over problems and seeds."""
    found = []
    for problem in run.config.problems:
        pairs = zip(
            values(run, problem, before, step, column), values(run, problem, after, step, column), strict=True
        )  # fmt: skip
        found += [new / old - 1 for old, new in pairs if old]
    return statistics.mean(found) if found else 0.0


def of_problem(run: Run, problem: str) -> list[Result]:
    """Lines of one problem: exact samples, then every method."""
    truth = exact(run, problem)
    lines = [
        Result(
            f"{problem}: exact samples of p_σ: invalid; distance of all, of valid points, of fresh data, in σ",
            f"{truth['invalid']:.1%}; {truth['all']:.2f}, {truth['valid']:.2f}, {truth['floor']:.2f}",
        )
    ]
    for method in METHODS:
        shares = by_step(run, problem, method, "invalid")
        if not shares:
            continue
        step = run.config.step_sizes[0]
        text = ", ".join(f"{100 * statistics.mean(v):.1f}" for v in shares.values())
        whole, valid = (spread(values(run, problem, method, step, c), ".2f") for c in ("all", "valid"))
        lines.append(
            Result(
                f"{problem}, {method}: invalid points in % by step size; distance of all, of valid points at the first",
                f"{text}; {whole}, {valid}",
            )
        )
        rows = run.by_seed("boundary", "mean", problem=problem, field=method)
        if PROBLEMS[problem].domain.dim == 2 and rows:
            score = run.by_seed("boundary", "score_mean", problem=problem, field=method)
            lines.append(
                Result(
                    f"{problem}, {method}: mean of σ f·n over the boundary, of σ s·n",
                    f"{spread(rows)}; {statistics.mean(score):.3f}",
                )
            )
    return lines
