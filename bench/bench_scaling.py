"""The score as points, reference points, dimensions, groups and threads grow: time, and memory up to a limit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.baselines import ATTENTION, KEOPS, PUBLISHED, WHOLE
from bench.measuring import fits_time_limit, measure
from bench.tasks import PASS, SCORE, Task
from bench.workloads import GENES, LARGE, SCALING, Workload

IMPLEMENTATIONS = ("cpu", WHOLE, KEOPS, ATTENTION)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("what", "workload", "implementation"),
    [
        pytest.param(what, workload, implementation, id=f"{workload.name}-{implementation}")
        for what, workloads in SCALING.items()
        for workload in workloads
        for implementation in IMPLEMENTATIONS
        if fits_time_limit(SCORE, workload, implementation)
    ],
)
def test_sizes(benchmark: Any, what: str, workload: Workload, implementation: str) -> None:
    benchmark.group = f"{SCORE.name} by {what}: {workload.name}"
    measure(benchmark, SCORE, workload, implementation, torch.float32, with_memory=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= torch.get_num_threads()])
@pytest.mark.parametrize("implementation", ["cpu", PUBLISHED])
@pytest.mark.parametrize("task", [SCORE, PASS], ids=lambda task: task.name)
@pytest.mark.parametrize("workload", [GENES[1], LARGE[0]], ids=lambda workload: workload.name)
def test_threads(benchmark: Any, task: Task, workload: Workload, implementation: str, count: int) -> None:
    torch.set_num_threads(count)
    benchmark.group = f"{task.name} by threads, {workload.name}: {count}"
    measure(benchmark, task, workload, implementation, torch.float32, with_memory=False)
