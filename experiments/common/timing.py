"""Training steps timed on every backend that runs here, in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from experiments.common.run import Result, Run
from fluxkernels import BackendError, backends, resolve_backend
from fluxmatching import Trainer


def log_steps(run: Run, objectives: Sequence[str], make: Callable[[str, str], Trainer], steps: int) -> None:
    """Log the median time of a step (rows "step") for every objective and backend, unless the run has all of them.

    Args:
        run: gives the device.
        objectives: what is trained.
        make: (objective, backend) -> a trainer without a folder; what it learns is thrown away.
        steps: timed, after two to warm up.
    """
    done = {(row["objective"], row["backend"]) for row in run.rows("step")}
    wanted = [(objective, backend) for backend in backends() if _runs(backend, run) for objective in objectives]
    if done >= set(wanted):
        return
    trainers = {key: make(*key) for key in wanted}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    for _ in run.bar(range(steps + 2), "time of a step"):
        for key, trainer in trainers.items():
            begun = time.perf_counter()
            trainer.step()  # waits for the loss's value
            times[key].append(time.perf_counter() - begun)
    for (objective, backend), found in times.items():
        if (objective, backend) in done:
            continue
        run.log(kind="step", objective=objective, backend=backend, seconds=statistics.median(found[2:]))


def _runs(backend: str, run: Run) -> bool:
    try:
        resolve_backend(backend, run.device)
    except BackendError:
        return False
    return True


def step_results(run: Run, baseline: str, paper: dict[str, str] | None = None) -> list[Result]:
    """A line for every objective: its step on every backend, and over that of `baseline` on the same backend."""
    rows = run.rows("step")
    base = {row["backend"]: row["seconds"] for row in rows if row["objective"] == baseline}
    lines = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        found = [
            f"{row['backend']} {_time(row['seconds'])} ({row['seconds'] / base[row['backend']]:.2f} × {baseline})"
            for row in rows
            if row["objective"] == objective
        ]
        lines.append(Result(f"training step, {objective}", "; ".join(found), (paper or {}).get(objective, "–")))
    return lines


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
