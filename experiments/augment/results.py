"""Lines of the summary, read from the logged rows."""

from __future__ import annotations

import math
import statistics

from experiments.augment import problems
from experiments.augment.chains import KINDS
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


def level(run: Run, name: str) -> float:
    """Return the bias at which fields are compared on a problem."""
    return float(run.config.gaussian_bias if name == problems.GAUSSIAN else run.config.bias)


def evaluations(run: Run, name: str, field: str, kind: str | None = None) -> list[float]:
    """Return the fewest evaluations per draw at the bias of the comparison, by seed, of one kind of schedule or all."""
    found = []
    for seed in range(run.config.seeds):
        known = {"problem": name, "field": field, "seed": seed, **({} if kind is None else {"schedule": kind})}
        rows = [row for row in run.rows("cost") if known.items() <= row.items()]
        found.append(min((row["evaluations"] for row in rows if row["bias"] <= level(run, name)), default=math.inf))
    return found


def costs(run: Run, name: str, field: str) -> list[Result]:
    """One line about the chains of a field, with its gain over the score that it is added to."""
    base = TRAINED if field in (TRAINED, TRAINED_LEARNED) else SCORE
    best = evaluations(run, name, field)
    by_kind = ", ".join(f"{kind} {spread(evaluations(run, name, field, kind), '.1f')}" for kind in KINDS)
    lines = [Result(f"{name}, {field}: evaluations per draw", f"{spread(best, '.1f')} ({by_kind})")]
    if field != base:
        for kind, what in ((KINDS[0], "constant steps"), (None, "best of all steps")):
            before, after = (evaluations(run, name, which, kind) for which in (base, field))
            gains = [a / b for a, b in zip(before, after, strict=True)]
            quantity = f"{name}, {field}: times fewer than {base}, {what}"
            lines.append(Result(quantity, spread(gains, ".2f"), "criterion: above 1 in every seed", min(gains) > 1))
    return lines
