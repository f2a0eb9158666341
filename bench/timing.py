"""Time and peak memory of calls: the one place where the benchmarks take them.

`torch.utils.benchmark` warms up with two calls before each time, and repeats a call for a minimum time. A training
step changes its model and may take seconds: it is timed call by call here. Kernels on a GPU are timed by `do_bench` of
Triton.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import benchmark

ROOT = Path(__file__).parents[1]
GPU_MILLISECONDS = 500  # that all repetitions of one measurement on a GPU take together
Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Result and seconds of one call, until the GPU has finished where there is one."""
    begin = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def in_turns(calls: Sequence[Callable[[], object]], repetitions: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each call, taking turns, after some turns that warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-warm_up, repetitions):
        for call, found in zip(calls, seconds, strict=True):
            _, taken = timed(call)
            if turn >= 0:
                found.append(taken)
    return seconds


def medians(calls: Sequence[Callable[[], object]], repetitions: int, warm_up: int = 1) -> list[float]:
    """Median seconds of each call, taking turns."""
    return [statistics.median(seconds) for seconds in in_turns(calls, repetitions, warm_up)]


def median_of_repeated(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Median seconds of a call that may be repeated at will."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def on_gpu(call: Callable[[], object]) -> dict[str, float]:
    """Seconds on the GPU at the 10th, 50th and 90th percentile; its cache is emptied before every call."""
    from triton.testing import do_bench

    quantiles = {"p10": 0.1, "median": 0.5, "p90": 0.9}
    found = do_bench(call, rep=GPU_MILLISECONDS, quantiles=list(quantiles.values()))
    return {name: 1e-3 * value for name, value in zip(quantiles, found, strict=True)}


def fastest_on_gpu(call: Callable[[], object]) -> float:
    """Seconds on the GPU of the fastest call."""
    from triton.testing import do_bench

    return float(1e-3 * do_bench(call, rep=GPU_MILLISECONDS, return_mode="min"))


def gpu_peak_memory(call: Callable[[], object], *, beyond_present: bool = False) -> int:
    """Largest number of bytes allocated on the GPU during a call, in all or beyond those allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if beyond_present else 0
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(key: str) -> int:
    """Bytes in /proc: VmRSS is resident now, VmHWM its peak.

    The peak of `getrusage` would not do: a process starts with that of the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def resident_growth(call: Callable[[], object]) -> int:
    """Bytes by which the peak of this process's resident set exceeds what is resident now, after a call."""
    # The peak so far may be above what is resident now: the difference is counted in, never out.
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def run_module(module: str, *arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` from the root of the checkout, in a process with memory of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=check, **options)
