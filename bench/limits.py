"""How fast this machine could be: a model of the arithmetic, and the rates that a micro-benchmark measures."""

import math
from typing import Any

import torch
from torch import Tensor

from bench.cases import STEPS, Case
from bench.peers import LOG_DENSITY, PASS, SCORE
from fluxkernels.cpu import _kernels

# Chain steps, the first of which gives s(x0) as well, then s(x_τ) and the transition.
EVALUATIONS = {PASS: STEPS + 2, SCORE: 1, LOG_DENSITY: 1}


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
    """Time of the arithmetic alone if every pair is computed.

    A pair costs one exponential, D multiply-adds for the distance and D for the mean; a log-density needs no mean. The
    pass averages scores, which have D coordinates too, so its transition costs what an evaluation does.
    """
    multiply_adds = case.dimensions * (1 if op == LOG_DENSITY else 2)
    exponentials, fma = rates
    return EVALUATIONS[op] * case.pairs * (1 / exponentials + multiply_adds / fma)


def live_share(x: Tensor, sigma2: float) -> float:
    """Share of the pairs whose weight is above rounding in float64: the others need not be computed."""
    queries, refs = x[:4, :512].double(), x[:4].double()
    distances = torch.cdist(queries, refs, compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = (distances - distances.amin(-1, keepdim=True)) / (2 * sigma2)
    return float((excess < -math.log(torch.finfo(torch.float64).eps)).double().mean())
