"""Every op on every family of shapes: our backends beside plain PyTorch, torch.compile, KeOps, attention, scikit-learn.

pytest bench --benchmark-only
"""

from typing import Any

import pytest
import torch

from bench import peers
from bench.cases import CELEBA, CIFAR, FAMILIES, GENES, MANY, SPRINGS, TOY, Case
from bench.measuring import measure, patient
from bench.peers import (
    BACKENDS,
    BACKWARD,
    CHAIN,
    COMPILED,
    LOG_DENSITY,
    MEAN,
    PASS,
    PEERS,
    PUBLISHED,
    RESIDUAL,
    SCORE,
    SKLEARN,
    STEP,
    TRANSITION,
    WEIGHTS,
)

MEMORY = {(op, case.name) for op in (SCORE, PASS) for case in (*GENES, CIFAR, CELEBA, MANY)}
SMALL = (TOY, GENES[1], SPRINGS, CIFAR)
# What these take elsewhere follows from the ops beside them: a step is a quarter of a chain, the mean the score.
BRIEF = (STEP, WEIGHTS, *(op + BACKWARD for op in (MEAN, STEP, CHAIN)))
# Their gradients are plain PyTorch on every backend, of matrices of all pairs.
HELD = tuple(op + BACKWARD for op in (WEIGHTS, TRANSITION, RESIDUAL, PASS))


def able(op: str, case: Case, who: str) -> bool:
    if who == SKLEARN:
        return False  # in float64, below
    if who == COMPILED:
        return case in SMALL  # a compilation takes up to a minute
    if (op in BRIEF and case not in SMALL) or (op in HELD and case not in (TOY, SPRINGS, CIFAR)):
        return False
    if op == RESIDUAL and who == PUBLISHED:
        # D backward passes through the density estimate, each of which holds a dozen matrices of all pairs.
        return case.dimensions == 2 and case.pairs < 1e6
    return patient(op, case, who)


FLOAT32 = [
    (op, case, who, torch.float32)
    for op in (*peers.OPS, *peers.DIFFERENTIATED)
    for case in FAMILIES
    for who in (*BACKENDS, *PEERS[op])
    if able(op, case, who)
]
OTHERS = [
    (op, case, who, dtype)
    for op in (SCORE, PASS)
    for case in (TOY, GENES[1], CIFAR)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
    for who in (*BACKENDS, PUBLISHED)
]
# scikit-learn computes in float64 alone.
DENSITIES = [
    (LOG_DENSITY, case, who, torch.float64) for case in (TOY, MANY) for who in (*BACKENDS, *PEERS[LOG_DENSITY])
]


@pytest.mark.parametrize(
    ("op", "case", "who", "dtype"),
    [
        pytest.param(op, case, who, dtype, id=f"{op}-{case.name}-{peers.name_of(dtype)}-{who}")
        for op, case, who, dtype in FLOAT32 + OTHERS + DENSITIES
    ],
)
def test_op(benchmark: Any, op: str, case: Case, who: str, dtype: torch.dtype) -> None:
    precision = "" if dtype == torch.float32 else f", {peers.name_of(dtype)}"
    benchmark.group = f"{op}{precision}: {case.name}"
    in_table = (op, case.name) in MEMORY and who in ("cpu", PUBLISHED) and dtype == torch.float32
    measure(benchmark, op, case, who, dtype, with_memory=in_table)
