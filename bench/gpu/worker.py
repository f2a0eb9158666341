"""The measurements of the check of a card, step by step, in a process that may be lost.

After an illegal access every call on the card fails for the rest of the process. Then it ends, and a new one takes the
next step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import recipes
from bench.gpu import rates
from bench.gpu.progress import Progress
from bench.gpu.runs import COMPILED, OURS, PLAIN, RUNS, GPURun, contenders, errors
from bench.timing import gpu_peak_memory, on_gpu
from bench.training import cost, presets, velocity

CARD_LOST = 3  # exit status


class CardLostError(RuntimeError):
    """The card answers no call of this process any more."""


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: its name in the results.
        run: adds its results, saving whenever there is one.
        optional: whether it is left out when no time is left.
    """

    name: str
    run: Callable[[Progress, float], None]
    optional: bool = True


def work(progress: Progress, deadline: float, steps: list[Step]) -> None:
    """Take all steps that no process has begun; `deadline` is a time of `time.time`.

    Raises:
        CardLostError: the other steps need another process.
    """
    results = progress.results
    for step in steps:
        if step.name in results["begun"] or step.name in results["left_out"]:
            continue
        if step.optional and time.time() > deadline:
            results["left_out"].append(step.name)
            progress.save()
            continue
        results["begun"].append(step.name)
        progress.save()
        try:
            step.run(progress, deadline)
        except CardLostError:
            raise
        except Exception as problem:
            results["failed"][step.name] = described(problem)
            print(f"{step.name}: {described(problem)}", flush=True)
            check_card()
        finally:
            progress.save()


def described(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:500]


def check_card() -> None:
    """Raise CardLostError if an error has made the card unusable for this process."""
    try:
        torch.cuda.synchronize()
    except Exception as problem:
        raise CardLostError(described(problem)) from problem


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Replay of one call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def measure(
    run: GPURun, limit: dict[str, float] | None, deadline: float, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row per contender; one that fails has its error's text instead of figures.

    Args:
        limit: best rates of the card, or None if they could not be measured.
        compiled: measure torch.compile alone.
    """
    found: dict[str, float] = {}
    for name, call in contenders(run, *run.inputs(), compiled).items():
        row: dict[str, Any] = {"run": run.described(), "implementation": name}
        try:
            if time.time() > deadline:
                raise TimeoutError("no time was left")
            with torch.no_grad():
                if name == OURS:
                    row["bound"] = run.task.tolerance()
                if name == COMPILED:
                    row["mode"] = run.compiled
                if name in (OURS, COMPILED):
                    found |= errors(run)
                row |= {"seconds": on_gpu(call), "memory": gpu_peak_memory(call, beyond_present=True)}
                if name == OURS:
                    row["graph"] = on_gpu(graph_of(call))
                    row["limit_seconds"] = rates.model_seconds(limit, run.task, run.workload) if limit else None
                    row["pairs_per_second"] = rates.pairs(run.task, run.workload) / row["graph"]["median"]
                judged = PLAIN if name == COMPILED else name
                if judged in found:
                    row["error"] = found[judged]
        except Exception as problem:  # out of memory, a compiler that fails: the row stays
            row["failed"] = described(problem)
        print_row(row)
        yield row
        if "failed" in row:
            check_card()
        torch.cuda.empty_cache()


def print_row(row: dict[str, Any]) -> None:
    """Print a row; of ours the predicted time beside the measured one."""
    figures = row.get("failed") or f"{1e6 * row['seconds']['median']:10.1f} us"
    if "failed" not in row and "graph" in row:
        measured, predicted = row["graph"]["median"], row["limit_seconds"]
        figures += f", graph: measured {1e6 * measured:.1f} us"
        if predicted is not None:
            figures += f", predicted {1e6 * predicted:.1f} us, ratio {measured / predicted:.2f}"
        figures += f"; error {row['error']:.1e}, bound {row['bound']:.0e}"
    print(f"{row['run']['kind']:6}{row['run']['name']:48}{row['implementation']:15}{figures}", flush=True)


def measure_rates(progress: Progress, _: float) -> None:
    progress.results["rates"] = found = rates.measure()
    print("rates per second:", {name: f"{rate:.3g}" for name, rate in found.items()}, flush=True)


def run_step(run: GPURun, compiled: bool = False) -> Step:
    def measured(progress: Progress, deadline: float) -> None:
        for row in measure(run, progress.results["rates"], deadline, compiled):
            progress.results["rows"].append(row)
            progress.save()

    return Step(f"{run.kind}: {run.name}{', torch.compile' if compiled else ''}", measured)


def training_step(setting: cost.Setting) -> Step:
    def measured(progress: Progress, _: float) -> None:
        try:
            rows = cost.measure(setting, "cuda", repetitions=10)
        except Exception as problem:
            methods, failed = setting.methods, described(problem)
            rows = [{"setting": asdict(setting), "method": method, "failed": failed} for method in methods]
        progress.results["training"] += rows
        print("\n".join(cost.table(rows)), flush=True)
        check_card()

    return Step(f"training: {setting.name}", measured)


def measure_velocity(progress: Progress, _: float) -> None:
    device = torch.device("cuda")
    found: dict[str, Any] = {}
    progress.results["velocity"] = found
    try:
        found["steps"] = velocity.step_seconds(device, ["torch", "triton"], 5)
        progress.save()
        found["fit"] = velocity.fit_seconds(device, epochs=100)
    except Exception as problem:  # no anndata, out of memory: the other results stay
        found["failed"] = described(problem)
    print("velocity", found, flush=True)
    check_card()


def measure_recipes(progress: Progress, _: float) -> None:
    print(recipes.HEAD)
    for row in recipes.measured(torch.device("cuda")):
        progress.results["recipes"].append(row)
        progress.save()
        print(recipes.line(row), flush=True)
        if "failed" in row:
            check_card()


def measure_presets(progress: Progress, _: float) -> None:
    print(presets.HEAD)
    for row in presets.measured("paper", torch.device("cuda"), num_steps=5):
        progress.results["presets"].append(row)
        progress.save()
        if "failed" in row:
            check_card()


def all_steps() -> list[Step]:
    """The most wanted first, for time may run out; what takes a compiler minutes comes last."""
    return [
        Step("rates", measure_rates, optional=False),
        *map(run_step, RUNS),
        Step("recipes", measure_recipes),
        *(training_step(setting) for setting in cost.GPU if setting.run != "compiled"),
        *(run_step(run, compiled=True) for run in RUNS if run.compiled),
        *(training_step(setting) for setting in cost.GPU if setting.run == "compiled"),
        Step("velocity", measure_velocity, optional=False),
        Step("presets", measure_presets, optional=False),
    ]


def main(progress: Progress, deadline: float) -> None:
    try:
        work(progress, deadline, all_steps())
    except CardLostError as problem:
        print(f"the card is lost for this process: {problem}", flush=True)
        sys.exit(CARD_LOST)
