"""Lines of the summary, read from the logged rows."""

from __future__ import annotations

import math
import statistics

from experiments.augment import problems
from experiments.augment.chains import CONSTANT, KINDS
from experiments.augment.measure import TURNS, kinds
from experiments.augment.training import SCORE, TRAINED, TRAINED_LEARNED
from experiments.common.results import Result, spread
from experiments.common.run import Run

CLOSE = 0.15  # largest difference between the loss and the measured ratio of autocorrelation times


def results(run: Run) -> list[Result]:
    """All lines of the summary."""
    lines = ranking(run)
    for name in problems.PROBLEMS:
        for field in kinds(run, name):
            lines += costs(run, name, field)
    return lines


def relative(run: Run, column: str) -> dict[float, list[float]]:
    """Return a column of the ranking over its value for the score, by turn and seed."""
    first = run.by_seed("ranking", column, turn=TURNS[0])
    return {
        turn: [a / b for a, b in zip(run.by_seed("ranking", column, turn=turn), first, strict=True)] for turn in TURNS
    }


def ranking(run: Run) -> list[Result]:
    """Lines about s + αJs: whether the loss, and the paper's proxy, rank fields as the measured time does."""
    times, losses, proxies = (relative(run, column) for column in ("time", "loss", "proxy"))
    shown = ", ".join(f"{turn:g}" for turn in TURNS)
    measured = [spread(run.by_seed("ranking", "time", turn=turn), ".2f") for turn in TURNS]
    apart = max(abs(statistics.mean(losses[turn]) - statistics.mean(times[turn])) for turn in TURNS)
    falls = statistics.mean(proxies[TURNS[-1]]) < statistics.mean(proxies[TURNS[0]])
    return [
        Result(f"s + αJs, α = {shown}: autocorrelation time (σ²)", ", ".join(measured)),
        Result(f"α = {shown}: measured time, relative", _row(times)),
        Result(
            f"α = {shown}: autocorrelation loss, relative", _row(losses), f"criterion: within {CLOSE}", apart < CLOSE
        ),
        Result(f"α = {shown}: proxy of Eq. 44, relative", _row(proxies), "criterion: falling", falls),
    ]


def _row(values: dict[float, list[float]]) -> str:
    return ", ".join(spread(values[turn]) for turn in TURNS)


def levels(run: Run, name: str) -> tuple[float, float]:
    """Return the two biases at which fields are compared on a problem: that of the config, and half of it."""
    bias = float(run.config.gaussian_bias if name == problems.GAUSSIAN else run.config.bias)
    return bias, bias / 2


def evaluations(run: Run, name: str, field: str, bias: float, kind: str | None = None) -> list[float]:
    """Return the fewest evaluations per draw with at most that bias, by seed, of one kind of schedule or all.

    Infinite where no schedule that was tried has so little bias and chains long enough to measure their memory.
    """
    known = {"problem": name, "field": field, **({} if kind is None else {"schedule": kind})}
    rows = [row for row in run.rows("cost") if known.items() <= row.items() and row["bias"] <= bias]
    return [
        min((row["evaluations"] for row in rows if row["seed"] == seed), default=math.inf)
        for seed in range(run.config.seeds)
    ]


def costs(run: Run, name: str, field: str) -> list[Result]:
    """Lines about the chains of a field at both biases: evaluations per draw, and gains over the score it is added to.

    Gains are those with constant steps, and those of the best of all schedules of both fields.
    """
    base = TRAINED if field in (TRAINED, TRAINED_LEARNED) else SCORE
    lines = []
    for bias in levels(run, name):
        place = f"{name}, {field}, bias {bias:g}"
        by_kind = ", ".join(f"{kind} {_counts(evaluations(run, name, field, bias, kind))}" for kind in KINDS)
        lines.append(Result(f"{place}: evaluations per draw", by_kind))
        if field == base:
            continue
        for kind, what in ((CONSTANT, "constant steps"), (None, "all schedules")):
            before, after = (evaluations(run, name, which, bias, kind) for which in (base, field))
            if not all(map(math.isfinite, (*before, *after))):
                lines.append(Result(f"{place}: times fewer, {what}", "not measured"))
                continue
            gains = [a / b for a, b in zip(before, after, strict=True)]
            shown = f"{spread(gains, '.2f')} (to {statistics.mean(after):.1f})"
            lines.append(
                Result(f"{place}: times fewer, {what}", shown, "criterion: above 1 in all seeds", min(gains) > 1)
            )
    return lines


def _counts(values: list[float]) -> str:
    return spread(values, ".1f") if all(map(math.isfinite, values)) else "–"
