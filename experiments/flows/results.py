"""Numbers of the summary and of the figures, read from the logged rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from experiments.common.results import Result
from experiments.common.run import Run
from experiments.flows.measure import EULER, SINGLE, SOLVERS, STABLE, TIMES
from experiments.flows.problems import PROBLEMS, Problem
from experiments.flows.training import EXACT, INDEPENDENT, RECTIFIED, variants

NEAR = 1.5  # times the distance of new data, which counts as nearly reached
CRITERION = "criterion: below 0 by more than 2 standard errors"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Sequence[float], digits: str = ".3f") -> str:
    """Format the mean and, for several values, its standard error."""
    mean = f"{statistics.mean(values):{digits}}"
    return f"{mean} ± {standard_error(values):{digits.removeprefix('+')}}" if len(values) > 1 else mean


def is_negative(values: Sequence[float]) -> bool | None:
    """Return whether the mean is below 0 by more than two standard errors; None for one value."""
    return None if len(values) == 1 else statistics.mean(values) + 2 * standard_error(values) < 0


def are_all(found: Sequence[bool | None]) -> bool | None:
    """Return whether all are true; None if one is None."""
    return None if None in found else all(found)


def distances(run: Run, problem: Problem, variant: str, solver: str) -> dict[int, list[float]]:
    """Return W2 by number of evaluations, one value per seed."""
    known = {"problem": problem.name, "variant": variant, "solver": solver}
    return {
        count: run.by_seed("distance", "w2", **known, evaluations=count)
        for count in run.config.evaluations
        if count % SOLVERS[solver][1] == 0
    }


def floors(run: Run, problem: Problem) -> list[float]:
    """Return the mean W2 of more new data to the new data, one value per seed."""
    return _means(run, "floor", problem=problem.name)


def over_floors(run: Run, problem: Problem, variant: str) -> list[float]:
    """Return the mean W2 in the most evaluations over that of more new data, one value per seed."""
    found = _means(run, "repeat", problem=problem.name, variant=variant)
    return [w2 / level for w2, level in zip(found, floors(run, problem), strict=True)]


def _means(run: Run, kind: str, **known: str) -> list[float]:
    return [statistics.mean(run.by_seed(kind, "w2", seed=seed, **known)) for seed in range(run.config.seeds)]


def trajectories(run: Run, problem: Problem, variant: str, column: str) -> list[float]:
    """Return "bend", "length" or their "ratio", one value per seed."""
    return run.by_seed("trajectories", column, problem=problem.name, variant=variant)


def variance(run: Run, target: str, t: float | None, column: str = "gradient_variance") -> list[float]:
    """Return the variance of the gradient or the loss of one target at time t, one value per seed."""
    rows = [row for row in run.rows("target") if (row["target"], row["t"]) == (target, t)]
    return [row[column] for row in sorted(rows, key=lambda row: row["seed"])]


def results(run: Run) -> list[Result]:
    """Return all lines of the summary: claims first, then the numbers behind them."""
    claims = [claim for problem in PROBLEMS for claim in claims_of(run, problem)]
    numbers = [line for problem in PROBLEMS for line in numbers_of(run, problem)]
    return [*claims, *targets(run), *numbers]


def claims_of(run: Run, problem: Problem) -> list[Result]:
    """Return the claims about one problem."""
    lines = [line for variant in (EXACT, RECTIFIED) for line in compare(run, problem, variant)]
    reached = {variant.name: over_floors(run, problem, variant.name) for variant in variants(problem)}
    lines.append(
        Result(
            f"{problem.name}: W2 in {max(run.config.evaluations)} evaluations (Heun) over W2 of new data",
            ", ".join(f"{name} {with_error(found, '.2f')}" for name, found in reached.items()),
            f"criterion: all below {NEAR} by more than 2 standard errors",
            are_all([is_negative([value - NEAR for value in found]) for found in reached.values()]),
        )
    )
    return lines


def compare(run: Run, problem: Problem, variant: str) -> list[Result]:
    """Compare a variant with independent pairs: straightness, and W2 in the fewest evaluations, seed by seed."""
    bends = _differences(*(trajectories(run, problem, name, "ratio") for name in (variant, INDEPENDENT)))
    by_count = [distances(run, problem, name, EULER) for name in (variant, INDEPENDENT)]
    few = sorted(run.config.evaluations)[:2]
    gains = [_differences(*(found[count] for found in by_count)) for count in few]
    return [
        Result(
            f"{problem.name}: bend / length, {variant} minus {INDEPENDENT}",
            with_error(bends, "+.3f"),
            CRITERION,
            is_negative(bends),
        ),
        Result(
            f"{problem.name}: W2 in {' / '.join(map(str, few))} evaluations (Euler), {variant} minus {INDEPENDENT}",
            " / ".join(with_error(found, "+.3f") for found in gains),
            CRITERION,
            are_all([is_negative(found) for found in gains]),
        ),
    ]


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def targets(run: Run) -> list[Result]:
    """Return the claim about the stable target, and the variances by time."""
    lines = []
    for column, name in (("gradient_variance", "gradient"), ("loss_variance", "loss")):
        ratios = {
            t: [s / o for s, o in zip(variance(run, STABLE, t, column), variance(run, SINGLE, t, column), strict=True)]
            for t in (None, *TIMES)
        }
        below = [ratio - 1 for ratio in ratios[None]]
        lines += [
            Result(
                f"checkerboard: variance of the {name}, {STABLE} / {SINGLE}",
                with_error(ratios[None]),
                "criterion: below 1 by more than 2 standard errors",
                is_negative(below),
            ),
            Result(
                f"checkerboard: the same of the {name} at t = {', '.join(map(str, TIMES))}",
                ", ".join(with_error(ratios[t], ".4f") for t in TIMES),
            ),
        ]
    return lines


def numbers_of(run: Run, problem: Problem) -> list[Result]:
    """Return W2 by number of evaluations, straightness and length of every variant of one problem."""
    lines = [Result(f"{problem.name}: W2 of more new data", with_error(floors(run, problem)))]
    for variant in variants(problem):
        for solver in SOLVERS:
            found = distances(run, problem, variant.name, solver)
            lines.append(
                Result(
                    f"{problem.name}, {variant.name}: W2 in {', '.join(map(str, found))} evaluations ({solver})",
                    ", ".join(map(with_error, found.values())),
                )
            )
        ratio, length = (trajectories(run, problem, variant.name, column) for column in ("ratio", "length"))
        lines.append(
            Result(
                f"{problem.name}, {variant.name}: bend / length; length", f"{with_error(ratio)}; {with_error(length)}"
            )
        )
    return lines
