"""Host work of every op on the `cpu` backend: the time of a call that has next to nothing to compute.

`python -m bench.host`. It is the processor time of checks, dispatch, views and results, for two points and D = 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.origin import Origin
from bench.tasks import inputs_of
from bench.workloads import Workload
from fluxkernels import use_backend
from tests.support.ops import OPS

ROUNDS, CALLS = 40, 50
SMALL = Workload("two points in two dimensions", 1, 2, 2, 2, 0.5)


def microseconds(call: Callable[[], Any]) -> float:
    """Processor time of a call, in the fastest of several rounds: the others met another process."""

    def one_round() -> float:
        begin = time.process_time()
        for _ in range(CALLS):
            call()
        return time.process_time() - begin

    one_round()
    return 1e6 * min(one_round() for _ in range(ROUNDS)) / CALLS


def table() -> list[str]:
    """Markdown: one line per op, for float32 without and with gradients."""
    lines = ["| op | host work | with gradients enabled |", "|---|---|---|"]
    for op in OPS:
        x, refs = SMALL.inputs()
        arguments = op.given(inputs_of(x[0], refs[0], SMALL.sigma2))
        options = {"seed": 0} if op.noise else {}
        plain = microseconds(lambda: op.function(**arguments, **options))  # noqa: B023
        first = next(iter(arguments))
        arguments[first] = arguments[first].clone().requires_grad_()
        recorded = microseconds(lambda: op.function(**arguments, **options))  # noqa: B023
        lines.append(f"| {op.name} | {plain:.0f} µs | {recorded:.0f} µs |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    with use_backend("cpu"):
        print("\n".join([Origin.here().dated(), "", *table()]))


if __name__ == "__main__":
    main()
