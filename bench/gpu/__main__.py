"""The check of a CUDA card: tests, then times of every case beside its peers, into one dated JSON of bench/results.

python -m bench.gpu [--output FOLDER] [--skip-tests] [--minutes 7]     what `make gpu` runs
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu import rates
from bench.gpu.cases import CASES, COMPILED, OURS, PLAIN, Case, contenders, errors
from bench.training import cost, presets, velocity

ROOT = Path(__file__).parents[2]
# Seconds that the calls of one measurement may take together.
BUDGET = 0.5


def timed(call: Callable[[], object]) -> list[float]:
    """Seconds of single calls between CUDA events, after warm-up; of several at a time where one is too short."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    at_once = max(1, min(10, int(1e-3 / seconds)))
    repetitions = max(2, min(200, int(BUDGET / seconds / at_once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for first, last in events:
        first.record()
        for _ in range(at_once):
            call()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 / at_once for first, last in events]


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Replay of one call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def quantiles(seconds: list[float]) -> dict[str, float]:
    found = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]).double())
    return dict(zip(("p10", "median", "p90"), found.tolist(), strict=True))


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes allocated at most during a call, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, limit: dict[str, float], deadline: float) -> list[dict[str, Any]]:
    """A row for each contender; one that fails has its error's text instead of figures."""
    x, refs = case.inputs()
    calls = contenders(case, x, refs)
    rows: list[dict[str, Any]] = []
    found: dict[str, float] = {}
    for who, call in calls.items():
        row: dict[str, Any] = {"case": asdict(case), "who": who}
        try:
            if time.perf_counter() > deadline:
                raise TimeoutError("no time was left")
            with torch.no_grad():
                if who == OURS:
                    found = errors(case)
                row |= {"seconds": quantiles(timed(call)), "memory": peak_memory(call)}
                if who == OURS:
                    row["graph"] = quantiles(timed(graph_of(call)))
                    shape = (case.groups, case.queries, case.centres, case.dimensions)
                    row["limit_seconds"] = rates.model_seconds(limit, case.kind, *shape)
                    row["pairs_a_second"] = rates.pairs(case.kind, *shape[:3]) / row["graph"]["median"]
                judged = PLAIN if who == COMPILED else who
                if judged in found:
                    row["error"] = found[judged]
        except Exception as problem:  # out of memory, a compiler that fails: the row stays
            row["failed"] = f"{type(problem).__name__}: {problem}"[:500]
        torch.cuda.empty_cache()
        rows.append(row)
        say(row)
    return rows


def say(row: dict[str, Any]) -> None:
    figures = row.get("failed") or f"{1e6 * row['seconds']['median']:10.1f} us"
    if "graph" in row:
        figures += f", graph {1e6 * row['graph']['median']:.1f} us, error {row['error']:.1e}"
        figures += f", limit {row['limit_seconds'] / row['graph']['median']:.0%}"
    print(f"{row['case']['kind']:6}{row['case']['name']:40}{row['who']:15}{figures}", flush=True)


def output(*command: str) -> str | None:
    """First line that a program prints, or None where there is no such program or no answer."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


def machine(commit: str | None) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "card": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit or output("git", "describe", "--always", "--dirty"),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=7, help="nothing further is measured after so long")
    parser.add_argument("--commit", help="what is measured, where git cannot say it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found: this check is for machines with an NVIDIA GPU")

    begun = time.perf_counter()
    results: dict[str, Any] = {
        "machine": machine(options.commit),
        "tests": None,
        "rows": [],
        "training": [],
        "velocity": None,
        "presets": None,
        "left_out": [],
    }
    print(json.dumps(results["machine"], indent=1), flush=True)
    if not options.skip_tests:
        results["tests"] = run_tests()
    results["rates"] = rates.measure(timed)
    print("rates a second:", {name: f"{rate:.3g}" for name, rate in results["rates"].items()}, flush=True)
    card = results["machine"]["card"].replace(" ", "-")
    file = options.output / f"{results['machine']['date'][:10]}-gpu-{card}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = begun + 60 * options.minutes
    # The most wanted first, for time may run out; what takes a compiler minutes comes last.
    for item in [*(s for s in cost.GPU if not s.compiled), *CASES, *(s for s in cost.GPU if s.compiled)]:
        kind = "training" if isinstance(item, cost.Setting) else item.kind
        if time.perf_counter() > deadline:
            results["left_out"].append(f"{kind}: {item.name}")
        elif isinstance(item, cost.Setting):
            results["training"] += cost.measure(item, "cuda", repetitions=10)
            print("\n".join(cost.table(results["training"][-len(item.ways) :])), flush=True)
        else:
            results["rows"] += measure(item, results["rates"], deadline)
        file.write_text(json.dumps(results, indent=1) + "\n")  # each time: what was measured is not lost
    try:
        device = torch.device("cuda")
        results["velocity"] = {
            "steps": velocity.step_seconds(device, ["torch", "triton"], 5),
            "fit": velocity.fit_seconds(device, passes=100),
        }
    except Exception as problem:  # no anndata, out of memory: the other results stay
        results["velocity"] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    print("velocity", results["velocity"], flush=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(presets.HEAD)
    results["presets"] = presets.measure("paper", torch.device("cuda"), steps=5)
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{file} after {time.perf_counter() - begun:.0f} s; left out: {results['left_out'] or 'none'}")
    if results["tests"] and not results["tests"]["passed"]:
        sys.exit("the GPU tests failed")


if __name__ == "__main__":
    main()
