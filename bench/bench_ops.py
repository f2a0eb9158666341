"""Every op on every family of shapes: our backends beside plain PyTorch, torch.compile, KeOps, attention, scikit-learn.

pytest bench --benchmark-only
"""

from typing import Any

import pytest
import torch

from bench import baselines
from bench.baselines import BACKENDS, COMPILED, PUBLISHED, SKLEARN, baselines_of
from bench.measuring import fits_time_limit, measure
from bench.tasks import AVERAGE, CHAIN, LOG_DENSITY, MEAN, PASS, RESIDUAL, SCORE, STEP, TASKS, WEIGHTS, Task
from bench.workloads import CELEBA, CIFAR, FAMILIES, GENES, MANY, SPRINGS, TOY, Workload

MEMORY = {(task.name, workload.name) for task in (SCORE, PASS) for workload in (*GENES, CIFAR, CELEBA, MANY)}
SMALL = (TOY, GENES[1], SPRINGS, CIFAR)
# Their times on other workloads follow from the tasks beside them: a step is a quarter of a chain, the mean the score.
BRIEF = (STEP, WEIGHTS, *(task.with_gradient() for task in (MEAN, STEP, CHAIN)))
# Their gradients are plain PyTorch on every backend, and materialize the matrices of all pairs.
NEEDS_ALL_PAIRS = tuple(task.with_gradient() for task in (WEIGHTS, AVERAGE, RESIDUAL, PASS))


def should_run(task: Task, workload: Workload, implementation: str) -> bool:
    if implementation == SKLEARN:
        return False  # in float64, below
    if implementation == COMPILED:
        return workload in SMALL  # a compilation takes up to a minute
    if task in BRIEF and workload not in SMALL:
        return False
    if task in NEEDS_ALL_PAIRS and workload not in (TOY, SPRINGS, CIFAR):
        return False
    if task == RESIDUAL and implementation == PUBLISHED:
        # D backward passes through the density estimate, each of which materializes a dozen matrices of all pairs.
        return workload.dimensions == 2 and workload.pairs < 1e6
    return fits_time_limit(task, workload, implementation)


FLOAT32 = [
    (task, workload, implementation, torch.float32)
    for task in TASKS.values()
    for workload in FAMILIES
    for implementation in (*BACKENDS, *baselines_of(task))
    if should_run(task, workload, implementation)
]
OTHERS = [
    (task, workload, implementation, dtype)
    for task in (SCORE, PASS)
    for workload in (TOY, GENES[1], CIFAR)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
    for implementation in (*BACKENDS, PUBLISHED)
]
# scikit-learn computes in float64 alone.
DENSITIES = [
    (LOG_DENSITY, workload, implementation, torch.float64)
    for workload in (TOY, MANY)
    for implementation in (*BACKENDS, *baselines_of(LOG_DENSITY))
]


@pytest.mark.parametrize(
    ("task", "workload", "implementation", "dtype"),
    [
        pytest.param(*row, id=f"{row[0].name}-{row[1].name}-{baselines.name_of(row[3])}-{row[2]}")
        for row in FLOAT32 + OTHERS + DENSITIES
    ],
)
def test_op(benchmark: Any, task: Task, workload: Workload, implementation: str, dtype: torch.dtype) -> None:
    precision = "" if dtype == torch.float32 else f", {baselines.name_of(dtype)}"
    benchmark.group = f"{task.name}{precision}: {workload.name}"
    in_table = (task.name, workload.name) in MEMORY and implementation in ("cpu", PUBLISHED) and dtype == torch.float32
    measure(benchmark, task, workload, implementation, dtype, with_memory=in_table)
