"""Limits of this machine: a model of the arithmetic, and the rates that a micro-benchmark measures."""

import math

import torch
from torch import Tensor

from bench.tasks import Task
from bench.workloads import Workload
from fluxkernels import cpu


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """(exponentials, multiply-adds) per second on PyTorch's number of threads, in float64 or in float32."""
    if cpu.missing():
        return math.nan, math.nan
    return cpu._kernels.rates(torch.get_num_threads(), dtype != torch.float64)


def model_seconds(task: Task, workload: Workload, rates: tuple[float, float]) -> float:
    """Time of the arithmetic alone if every pair is computed."""
    exponentials, multiply_adds = work(task, workload)
    return exponentials / rates[0] + multiply_adds / rates[1]


def work(task: Task, workload: Workload) -> tuple[int, int]:
    """Exponentials and multiply-adds of all pairs."""
    estimate, transition = task.arithmetic
    pairs, starts_and_ends = workload.pairs, workload.groups * workload.queries**2
    exponentials, vectors = (pairs * e + starts_and_ends * t for e, t in zip(estimate, transition, strict=True))
    return exponentials, vectors * workload.dimensions


def live_share(x: Tensor, refs: Tensor, sigma2: float) -> float:
    """Share of the pairs whose weight is above rounding in float64: the others need not be computed."""
    distances = torch.cdist(x.double(), refs.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = (distances - distances.amin(-1, keepdim=True)) / (2 * sigma2)
    return float((excess < -math.log(torch.finfo(torch.float64).eps)).double().mean())
