"""How fast this machine could be: a model of the arithmetic, and the rates that a micro-benchmark measures."""

import math
from typing import Any

import torch
from torch import Tensor

from bench.cases import STEPS, Case
from bench.peers import BACKWARD, CHAIN, LOG_DENSITY, MEAN, PASS, RESIDUAL, SCORE, TRANSITION
from fluxkernels.cpu import _kernels

# (exponentials, multiply-adds over D) of a pair at least. A distance is D multiply-adds, a weighted sum of vectors D
# more. A pass: the chain, s(x_τ) and a transition, whose first evaluation is the chain's own. A backward pass computes
# weights anew; then c_j needs one inner product, and the sums for the query and for the centre.
ARITHMETIC = {
    MEAN: (1, 2),
    SCORE: (1, 2),
    LOG_DENSITY: (1, 1),
    CHAIN: (STEPS, 2 * STEPS),
    TRANSITION: (2, 4),
    PASS: (STEPS + 2, 2 * STEPS + 4),
    RESIDUAL: (1, 4),
    SCORE + BACKWARD: (2, 7),
    LOG_DENSITY + BACKWARD: (2, 4),
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
    exponentials, multiply_adds = ARITHMETIC[op]
    return case.pairs * (exponentials / rates[0] + multiply_adds * case.dimensions / rates[1])


def live_share(x: Tensor, refs: Tensor, sigma2: float) -> float:
    """Share of the pairs whose weight is above rounding in float64: the others need not be computed."""
    distances = torch.cdist(x.double(), refs.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = (distances - distances.amin(-1, keepdim=True)) / (2 * sigma2)
    return float((excess < -math.log(torch.finfo(torch.float64).eps)).double().mean())
