"""Comparison of the measurements with the criteria, as lines of a table."""

from __future__ import annotations

import math
import statistics

from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.critic.methods import (
    CONTROL,
    CRITIC,
    CRITICS,
    CROSS,
    DSM,
    FEATURES,
    FOLLOWERS,
    LEARNED,
    METHODS,
    SINGLE,
)
from experiments.critic.problems import MIXTURE, NAMES

ERROR = 0.3  # largest relative error of the gradient
GOAL = 0.05  # part of σ² J at the start that counts as trained
WORTH_LEARNED, WORTH_CONTROL = 2.0, 1.2  # times the signal-to-noise ratio per second of cross-chain
STEPS = 10  # of the critic at the fixed field, for the error


def results(run: Run) -> list[Result]:
    """Compare with the criteria, then list every number."""
    lines = [critic_error(run), critic_rate(run)]
    lines += [reaching(run, method) for method in (*CRITICS, LEARNED)]
    lines += [learned_error(run), learned_rate(run), control_rate(run)]
    for name in NAMES:
        lines += [of_training(run, name, method) for method in METHODS]
    for name in NAMES:
        for stage in run.config.stages:
            lines += [
                line
                for method in (CROSS, SINGLE, FEATURES, CONTROL, DSM)
                for line in of_estimate(run, name, stage, method)
            ]
            lines += [line for method in FOLLOWERS for line in of_estimate(run, name, stage, method)]
    return lines


def estimates(run: Run, name: str, stage: int, method: str, k: int, column: str) -> list[float]:
    """Return the values in a column of the estimates, in the order of seeds."""
    return run.by_seed("estimate", column, problem=name, stage=stage, method=method, k=k)


def alignment(cosine: float, snr: float) -> float:
    """Return the cosine between the gradient of one minibatch and the exact one, about, from that of its mean."""
    return cosine / math.sqrt(1 + cosine**2 / max(snr, 1e-30))


def alignments(run: Run, name: str, stage: int, method: str, k: int) -> list[float]:
    """Return the alignment of one minibatch, in the order of seeds."""
    columns = (estimates(run, name, stage, method, k, column) for column in ("cosine", "snr"))
    return [alignment(cosine, snr) for cosine, snr in zip(*columns, strict=False)]


def cases(run: Run) -> list[tuple[str, int]]:
    """Return problem and stage of all estimates, in the order of the numbers in a line."""
    return [(name, stage) for name in NAMES for stage in run.config.stages]


def names_of(run: Run) -> str:
    """Return the names of these cases."""
    return "; ".join(f"{name} after {', '.join(map(str, run.config.stages))} steps" for name in NAMES)


def listed(run: Run, values: list[float]) -> str:
    """Format one number per case."""
    count = len(run.config.stages)
    parts = [values[:count], values[count:]]
    return "; ".join(" / ".join(f"{value:.2f}" for value in part) for part in parts)


def error_of(run: Run, method: str, title: str) -> Result:
    """Compare the relative error after further steps with the criterion."""
    k = max(extra for extra in run.config.extra if extra <= STEPS)
    found = [statistics.mean(estimates(run, *case, method, k, "error")) for case in cases(run)]
    passed = max(found) <= ERROR
    return Result(f"{title}: {names_of(run)}", listed(run, found), f"criterion: at most {ERROR:g}", passed)


def critic_error(run: Run) -> Result:
    """Compare the error of the critic by parts."""
    return error_of(run, CRITIC, f"{CRITIC}: relative error of the gradient after {STEPS} further steps")


def learned_error(run: Run) -> Result:
    """Compare the error of the learned q."""
    return error_of(run, LEARNED, f"{LEARNED}: relative error of the gradient after {STEPS} further steps")


def rate_of(run: Run, method: str, least: float) -> Result:
    """Compare the signal-to-noise ratio per second with that of the cross-chain estimator."""
    ratios = [
        statistics.mean(estimates(run, *case, method, 0, "rate"))
        / statistics.mean(estimates(run, *case, CROSS, 0, "rate"))
        for case in cases(run)
    ]
    title = f"{method}: signal-to-noise ratio per second over that of {CROSS}"
    return Result(title, listed(run, ratios), f"criterion: at least {least:g}", min(ratios) >= least)


def critic_rate(run: Run) -> Result:
    """Compare the critic by parts."""
    return rate_of(run, CRITIC, 1.0)


def learned_rate(run: Run) -> Result:
    """Compare the learned q."""
    return rate_of(run, LEARNED, WORTH_LEARNED)


def control_rate(run: Run) -> Result:
    """Compare the control variate."""
    return rate_of(run, CONTROL, WORTH_CONTROL)


def time_to_goal(run: Run, name: str, method: str) -> list[float]:
    """Return the CPU seconds until σ² J is at most `GOAL` of its start, one per seed; infinite if never."""
    found = []
    for seed in range(run.config.seeds):
        known = {"problem": name, "method": method, "seed": seed}
        rows = [row for row in run.rows("curve") if known.items() <= row.items()]
        start = rows[0]["loss"]
        found.append(min((row["seconds"] for row in rows if row["loss"] <= GOAL * start), default=math.inf))
    return found


def median_time(run: Run, name: str, method: str) -> float:
    """Return the median over seeds of `time_to_goal`."""
    return statistics.median(time_to_goal(run, name, method))


def reaching(run: Run, method: str) -> Result:
    """Compare the time to the goal with that of the cross-chain estimator."""
    pairs = [(median_time(run, name, method), median_time(run, name, CROSS)) for name in NAMES]
    text = "; ".join(
        f"{name} {seconds(own)}, {CROSS} {seconds(other)}" for name, (own, other) in zip(NAMES, pairs, strict=True)
    )
    passed = all(own <= other and math.isfinite(own) for own, other in pairs)
    return Result(
        f"{method}: CPU seconds to {GOAL:.0%} of σ² J at the start, median", text, f"criterion: at most {CROSS}", passed
    )  # fmt: skip


def seconds(value: float) -> str:
    """Format a time that may not have been reached."""
    return f"{value:.2f}" if math.isfinite(value) else "not reached"


def of_training(run: Run, name: str, method: str) -> Result:
    """List what a method's trainings end with."""
    known = {"problem": name, "method": method}
    losses, distances = (run.by_seed("final", column, **known) for column in ("loss", "distance"))
    sampled = run.by_seed("final", "w2", **known)
    text = f"σ² J {spread(losses, '.4f')}"
    text += f"; energy distance {spread(distances, '.5f')}; W2 of samples {spread(sampled)}" if name == MIXTURE else ""
    text += f"; W2 {spread(distances, '.2f')}" if name != MIXTURE else ""
    text += f"; to {GOAL:.0%} in {seconds(median_time(run, name, method))} s"
    return Result(f"{name}: {method} after {run.config.seconds(name):g} CPU seconds", text)


def of_estimate(run: Run, name: str, stage: int, method: str) -> list[Result]:
    """List error, cosine, signal-to-noise ratio and time of an estimator, by further steps."""
    lines = []
    for k in run.config.extra:
        found = {c: estimates(run, name, stage, method, k, c) for c in ("error", "cosine", "snr", "seconds", "rate")}
        if not found["snr"]:
            continue
        text = ""
        if found["error"]:
            aligned = alignments(run, name, stage, method, k)
            text += f"error {spread(found['error'], '.2f')}, cosine {spread(found['cosine'], '.2f')}, "
            text += f"of one minibatch {spread(aligned, '.2f')}, "
        text += f"SNR {spread(found['snr'], '.2f')}, {1e3 * found['seconds'][0]:.1f} ms, "
        text += f"{spread(found['rate'], '.0f')} per s"
        title = f"{name}, stage {stage}: {method}" + (f", k = {k}" if method in FOLLOWERS else "")
        lines.append(Result(title, text))
    return lines
