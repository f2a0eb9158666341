"""Times of training steps on every backend that runs here, taken in turns, so that load affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from experiments.common.results import Result
from experiments.common.run import Run
from fluxkernels import BackendError, backends, resolve_backend
from fluxmatching import Trainer


def log_steps(run: Run, objectives: Sequence[str], make: Callable[[str, str], Trainer], num_steps: int) -> None:
    """Log the median time per step (rows "step") for every objective and backend, unless the run has all of them.

    Args:
        run: the run, whose device is used.
        objectives: objectives to train.
        make: (objective, backend) -> a trainer without a folder; what it learns is not used.
        num_steps: number of timed steps, after two to warm up.
    """
    done = {(row["objective"], row["backend"]) for row in run.rows("step")}
    wanted = [(objective, backend) for backend in backends() if _runs(backend, run) for objective in objectives]
    if done >= set(wanted):
        return
    trainers = {key: make(*key) for key in wanted}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    for _ in run.bar(range(num_steps + 2), "time of a step"):
        for key, trainer in trainers.items():
            begun = time.perf_counter()
            trainer.step().item()  # waits for the device
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
    """Return one line per objective: time per step on every backend, and its ratio to `baseline` there."""
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
