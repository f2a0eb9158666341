"""One benchmark of one case: who may run it, its time, its error, its memory, and what the machine could do."""

import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import limits, memory, peers
from bench.cases import Case

# Nanoseconds for one pair, exponential and ten multiply-adds: they only decide how often a call is repeated.
NANOSECONDS = {"cpu": 1.0, "torch": 4.0, "keops": 15.0, "sklearn": 100.0}
# What one call may take; our torch backend is the definition of right, and slow.
PATIENCE = {"torch": 5.0}


def expected_seconds(op: str, case: Case, who: str) -> float:
    exponentials, multiply_adds = limits.work(op, case)
    return NANOSECONDS.get(who, 5.0) * (exponentials + multiply_adds / 10) * 1e-9


def patient(op: str, case: Case, who: str) -> bool:
    return expected_seconds(op, case, who) < PATIENCE.get(who, 60.0)


def describe(op: str, case: Case, who: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the report needs to know of a benchmark, beside what comes out."""
    return {
        "op": op,
        "case": {name: value for name, value in asdict(case).items() if name != "make"},
        "who": who,
        "dtype": peers.name_of(dtype),
        "threads": torch.get_num_threads(),
        "rates": limits.rates(),
    }


def measure(benchmark: Any, op: str, case: Case, who: str, dtype: torch.dtype, *, with_memory: bool) -> None:
    """Time the call and keep beside it all that a table says of it.

    Raises:
        AssertionError: an answer of ours is wrong. A peer's may be, and the report then prints no time of it.
    """
    if reason := peers.missing(who):
        pytest.skip(reason)
    info = benchmark.extra_info
    info |= describe(op, case, who, dtype)
    if with_memory:
        try:
            info["memory"] = memory.peak_extra(op, case, who, dtype)
        except memory.OutOfMemoryError as error:
            info["failed"] = f"out of memory: {error}"
            benchmark.pedantic(lambda: None)  # every entry of the JSON has a time; this one is not printed
            return
    x, refs = (points.to(dtype) for points in case.inputs())
    call = peers.function(op, who)
    small = (x, refs) if who == peers.COMPILED else (x[:2, :8].contiguous(), refs[:2, :8].contiguous())
    call(*small, case.sigma2)  # imports and compiles what there is to

    wall, busy = time.perf_counter(), time.process_time()
    seconds = expected_seconds(op, case, who)
    if seconds < 0.5:
        benchmark(call, x, refs, case.sigma2)
    else:
        again = 3 if seconds < 5 else 1
        benchmark.pedantic(call, (x, refs, case.sigma2), rounds=again, warmup_rounds=int(again > 1))
    info["cores"] = (time.process_time() - busy) / (time.perf_counter() - wall)
    info["live_share"] = limits.live_share(*peers.judged(x, refs), case.sigma2)
    info["error"] = peers.relative_error(op, who, case, dtype)
    if who in peers.BACKENDS:
        assert info["error"] < peers.tolerance(op, who, dtype)
