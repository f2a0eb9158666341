"""Score, log-density and the pass of a training step: our backends beside plain PyTorch, KeOps and scikit-learn.

pytest bench --benchmark-only
"""

import time
from dataclasses import astuple
from typing import Any

import pytest
import torch

from bench import limits, memory, peers
from bench.cases import CASES, Case

# Nanoseconds for one pair in one evaluation, roughly: they only decide how often a call is repeated.
NANOSECONDS = {"cpu": 1, "torch": 4, "published": 10, "keops": 15, "sklearn": 100}
# Peak memory is measured where one more call, in a process of its own, takes no longer than this.
PATIENCE = 30


def expected_seconds(op: str, case: Case, who: str) -> float:
    return limits.EVALUATIONS[op] * case.pairs * NANOSECONDS[who] * 1e-9


RUNS = [
    pytest.param(op, case, who, id=f"{op}-{case.name}-{who}")
    for op, cases in CASES.items()
    for case in cases
    for who in (*peers.BACKENDS, *peers.PEERS[op])
    if who != "torch" or expected_seconds(op, case, who) < 10
]


@pytest.mark.parametrize(("op", "case", "who"), RUNS)
def test_speed(benchmark: Any, op: str, case: Case, who: str) -> None:
    if reason := peers.missing(who):
        pytest.skip(reason)
    x, sigma2 = case.inputs().to(peers.dtype(op, who)), case.sigma2
    call = peers.function(op, who)
    call(x[:2, :8].contiguous(), x[:2, :8].contiguous(), sigma2)  # imports and compiles what there is to

    benchmark.group = f"{op}: {case.name}"
    wall, busy = time.perf_counter(), time.process_time()
    seconds = expected_seconds(op, case, who)
    if seconds < 0.5:
        result = benchmark(call, x, x, sigma2)
    else:
        again = 3 if seconds < 5 else 1
        result = benchmark.pedantic(call, (x, x, sigma2), rounds=again, warmup_rounds=int(again > 1))
    cores = (time.process_time() - busy) / (time.perf_counter() - wall)

    error = peers.relative_error(op, who, x, sigma2, result)
    del result
    benchmark.extra_info |= {
        "op": op,
        "case": astuple(case)[:5],
        "who": who,
        "threads": torch.get_num_threads(),
        "cores": cores,
        "error": error,
        "rates": limits.rates(),
        "live_share": limits.live_share(x, sigma2),
    }
    if op != peers.LOG_DENSITY and case.pairs > 1e8 and who in ("cpu", "published") and seconds < PATIENCE:
        benchmark.extra_info["memory"] = memory.peak_extra(op, case, who)
    assert error < peers.tolerance(who)
