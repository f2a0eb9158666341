"""How fast this machine could be: a model of the arithmetic, and the rates that a micro-benchmark measures."""

import math
from typing import Any

import torch
from torch import Tensor

from bench.cases import STEPS, Case
from bench.peers import BACKWARD, CHAIN, LOG_DENSITY, MEAN, PASS, RESIDUAL, SCORE, STEP, TRANSITION, WEIGHTS
from fluxkernels.cpu import _kernels

# (exponentials, multiply-adds over D) at least, of a query and a centre, and of a start and an end of a transition. A
# distance is D multiply-adds, a weighted sum of vectors D more. A pass: the chain, whose first evaluation serves the
# transition too, and s(x_τ). A backward pass computes weights anew; then it needs an inner product with what came back,
# and sums for both points of a pair.
ESTIMATE, TRANSITIONS = (1, 2), (1, 2)
_BACK = 2, 7  # of either, forward and backward
Arithmetic = tuple[tuple[int, int], tuple[int, int]]
ARITHMETIC: dict[str, Arithmetic] = {
    MEAN: (ESTIMATE, (0, 0)),
    SCORE: (ESTIMATE, (0, 0)),
    LOG_DENSITY: ((1, 1), (0, 0)),
    STEP: (ESTIMATE, (0, 0)),
    CHAIN: ((STEPS, 2 * STEPS), (0, 0)),
    WEIGHTS: (ESTIMATE, (1, 1)),
    TRANSITION: (ESTIMATE, TRANSITIONS),
    RESIDUAL: ((1, 4), (0, 0)),
    PASS: ((STEPS + 1, 2 * STEPS + 2), TRANSITIONS),
    MEAN + BACKWARD: (_BACK, (0, 0)),
    SCORE + BACKWARD: (_BACK, (0, 0)),
    LOG_DENSITY + BACKWARD: ((2, 4), (0, 0)),
    STEP + BACKWARD: (_BACK, (0, 0)),
    CHAIN + BACKWARD: ((2 * STEPS, 7 * STEPS), (0, 0)),
    WEIGHTS + BACKWARD: (_BACK, (2, 4)),
    TRANSITION + BACKWARD: (_BACK, _BACK),
    RESIDUAL + BACKWARD: ((2, 10), (0, 0)),  # three points of a pair get sums: query, centre and the field's value
    PASS + BACKWARD: ((2 * STEPS + 2, 7 * STEPS + 7), _BACK),
}


def rates() -> tuple[float, float]:
    """(double-precision exponentials, multiply-adds) a second on PyTorch's number of threads."""
    return (math.nan, math.nan) if _kernels is None else _kernels.rates(torch.get_num_threads())


def machine() -> dict[str, Any]:
    """What the report says of this machine and of how the kernels use it."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "target": "none" if _kernels is None else _kernels.target(),
        "thread_source": "none" if _kernels is None else _kernels.thread_source(),
    }


def model_seconds(op: str, case: Case, rates: tuple[float, float]) -> float:
    """Time of the arithmetic alone if every pair is computed."""
    exponentials, multiply_adds = work(op, case)
    return exponentials / rates[0] + multiply_adds / rates[1]


def work(op: str, case: Case) -> tuple[int, int]:
    """Exponentials and multiply-adds of all pairs."""
    estimate, transition = ARITHMETIC[op]
    pairs, starts_and_ends = case.pairs, case.groups * case.queries**2
    exponentials, vectors = (pairs * e + starts_and_ends * t for e, t in zip(estimate, transition, strict=True))
    return exponentials, vectors * case.dimensions


def live_share(x: Tensor, refs: Tensor, sigma2: float) -> float:
    """Share of the pairs whose weight is above rounding in float64: the others need not be computed."""
    distances = torch.cdist(x.double(), refs.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = (distances - distances.amin(-1, keepdim=True)) / (2 * sigma2)
    return float((excess < -math.log(torch.finfo(torch.float64).eps)).double().mean())
