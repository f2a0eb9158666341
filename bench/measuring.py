"""One benchmark of one task: its time, its error, its memory, and the limit of the machine."""

import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import baselines, limits, memory
from bench.tasks import Task
from bench.workloads import Workload

# Nanoseconds for one pair, exponential and ten multiply-adds: they only decide how often a call is repeated.
NANOSECONDS = {"cpu": 1.0, "torch": 4.0, "keops": 15.0, "sklearn": 100.0}
# Seconds that one call may take; our torch backend is correct but not optimized.
TIME_LIMIT = {"torch": 5.0}


def expected_seconds(task: Task, workload: Workload, implementation: str) -> float:
    exponentials, multiply_adds = limits.work(task, workload)
    return NANOSECONDS.get(implementation, 5.0) * (exponentials + multiply_adds / 10) * 1e-9


def fits_time_limit(task: Task, workload: Workload, implementation: str) -> bool:
    return expected_seconds(task, workload, implementation) < TIME_LIMIT.get(implementation, 60.0)


def describe(name: str, workload: Workload, implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """The entries that identify a benchmark in the report, beside its results."""
    return {
        "task": name,
        "workload": {key: value for key, value in asdict(workload).items() if key != "make"},
        "implementation": implementation,
        "dtype": baselines.name_of(dtype),
        "threads": torch.get_num_threads(),
        "rates": limits.rates(dtype),
    }


def measure(
    benchmark: Any, task: Task, workload: Workload, implementation: str, dtype: torch.dtype, *, with_memory: bool
) -> None:
    """Time the call, and keep beside it all that a table shows.

    Raises:
        AssertionError: an answer of ours is wrong. One of a baseline may be, and the report then prints no time of it.
    """
    if reason := baselines.missing(implementation):
        pytest.skip(reason)
    info = benchmark.extra_info
    info |= describe(task.name, workload, implementation, dtype)
    if with_memory:
        try:
            info["memory"] = memory.peak_extra(task, workload, implementation, dtype)
        except memory.OutOfMemoryError as error:
            info["failed"] = f"out of memory: {error}"
            benchmark.pedantic(lambda: None)  # every entry of the JSON has a time; this one is not printed
            return
    x, refs = (points.to(dtype) for points in workload.inputs())
    call, sigma2 = baselines.function(task, implementation), workload.sigma2
    small = (x, refs) if implementation == baselines.COMPILED else (x[:2, :8].contiguous(), refs[:2, :8].contiguous())
    call(*small, sigma2)  # imports and compiles what there is to

    wall, busy = time.perf_counter(), time.process_time()
    seconds = expected_seconds(task, workload, implementation)
    if seconds < 0.5:
        benchmark(call, x, refs, sigma2)
    else:
        again = 3 if seconds < 5 else 1
        benchmark.pedantic(call, (x, refs, sigma2), rounds=again, warmup_rounds=int(again > 1))
    info["cores"] = (time.process_time() - busy) / (time.perf_counter() - wall)
    info["live_share"] = limits.live_share(*baselines.judged(x, refs), sigma2)
    info["error"] = baselines.relative_error(task, implementation, workload, dtype)
    if implementation in baselines.BACKENDS:
        assert info["error"] < baselines.tolerance(task, implementation, dtype)
