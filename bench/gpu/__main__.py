"""The check of a CUDA card: tests, then times of every run beside its baselines, into one dated JSON of bench/results.

python -m bench.gpu [--output FOLDER] [--skip-tests] [--minutes 7]     what `make gpu` runs
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.gpu import rates
from bench.gpu.runs import COMPILED, OURS, PLAIN, RUNS, GPURun, contenders, errors
from bench.origin import Origin
from bench.timing import gpu_peak_memory, on_gpu
from bench.training import cost, presets, velocity

ROOT = Path(__file__).parents[2]


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


def measure(run: GPURun, limit: dict[str, float], deadline: float) -> list[dict[str, Any]]:
    """A row per contender; one that fails has its error's text instead of figures."""
    rows: list[dict[str, Any]] = []
    found: dict[str, float] = {}
    for name, call in contenders(run, *run.inputs()).items():
        row: dict[str, Any] = {"run": run.described(), "implementation": name}
        try:
            if time.perf_counter() > deadline:
                raise TimeoutError("no time was left")
            with torch.no_grad():
                if name == OURS:
                    found = errors(run)
                row |= {"seconds": on_gpu(call), "memory": gpu_peak_memory(call, beyond_present=True)}
                if name == OURS:
                    row["graph"] = on_gpu(graph_of(call))
                    row["limit_seconds"] = rates.model_seconds(limit, run.task, run.workload)
                    row["pairs_per_second"] = rates.pairs(run.task, run.workload) / row["graph"]["median"]
                judged = PLAIN if name == COMPILED else name
                if judged in found:
                    row["error"] = found[judged]
        except Exception as problem:  # out of memory, a compiler that fails: the row stays
            row["failed"] = f"{type(problem).__name__}: {problem}"[:500]
        torch.cuda.empty_cache()
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    figures = row.get("failed") or f"{1e6 * row['seconds']['median']:10.1f} us"
    if "graph" in row:
        figures += f", graph {1e6 * row['graph']['median']:.1f} us, error {row['error']:.1e}"
        figures += f", limit {row['limit_seconds'] / row['graph']['median']:.0%}"
    print(f"{row['run']['kind']:6}{row['run']['name']:48}{row['implementation']:15}{figures}", flush=True)


def run_tests() -> dict[str, Any]:
    """The GPU's tests, in a process of their own; compiling for other cards needs none and is left out.

    They do not tune: that would compile each kernel three times, and the benchmarks do.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fluxkernels/test_gpu.py",
         "tests/fluxkernels/test_triton.py", "-k", "not compile_for"],
        cwd=ROOT, env={**os.environ, "FLUXKERNELS_AUTOTUNE": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:]}


def measure_velocity() -> dict[str, Any]:
    device = torch.device("cuda")
    try:
        return {
            "steps": velocity.step_seconds(device, ["torch", "triton"], 5),
            "fit": velocity.fit_seconds(device, epochs=100),
        }
    except Exception as problem:  # no anndata, out of memory: the other results stay
        return {"failed": f"{type(problem).__name__}: {problem}"[:300]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=records.RESULTS)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=7, help="nothing further is measured after so long")
    parser.add_argument("--commit", help="commit of a copy without git")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found: this check is for machines with an NVIDIA GPU")
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    origin = Origin.here(torch.device("cuda"), options.commit)
    results: dict[str, Any] = {
        **origin.fields(),
        "tests": None,
        "rows": [],
        "training": [],
        "velocity": None,
        "presets": None,
        "left_out": [],
    }
    kind = f"gpu-{origin.machine['card'].replace(' ', '-')}"
    print(json.dumps(results["machine"], indent=1), flush=True)
    if not options.skip_tests:
        results["tests"] = run_tests()
    results["rates"] = rates.measure()
    print("rates per second:", {name: f"{rate:.3g}" for name, rate in results["rates"].items()}, flush=True)
    deadline = begin + 60 * options.minutes
    # The most wanted first, for time may run out; what takes a compiler minutes comes last.
    items: list[cost.Setting | GPURun] = [
        *(s for s in cost.GPU if not s.compiled),
        *RUNS,
        *(s for s in cost.GPU if s.compiled),
    ]
    for item in items:
        if time.perf_counter() > deadline:
            label = "training" if isinstance(item, cost.Setting) else item.kind
            results["left_out"].append(f"{label}: {item.name}")
        elif isinstance(item, cost.Setting):
            results["training"] += cost.measure(item, "cuda", repetitions=10)
            print("\n".join(cost.table(results["training"][-len(item.methods) :])), flush=True)
        else:
            results["rows"] += measure(item, results["rates"], deadline)
        records.keep(kind, results, origin.date, options.output)  # each time: nothing measured is lost
    results["velocity"] = measure_velocity()
    print("velocity", results["velocity"], flush=True)
    records.keep(kind, results, origin.date, options.output)
    print(presets.HEAD)
    results["presets"] = presets.measure("paper", torch.device("cuda"), num_steps=5)
    file = records.keep(kind, results, origin.date, options.output)
    print(f"{file} after {time.perf_counter() - begin:.0f} s; left out: {results['left_out'] or 'none'}")
    if results["tests"] and not results["tests"]["passed"]:
        sys.exit("the GPU tests failed")


if __name__ == "__main__":
    main()
