"""Noise schedules: decreasing noise levels for the samplers."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fluxkernels.checks import (
    check_finite,
    check_num_steps,
    check_positive,
    check_sigma_range,
    check_tensor,
    read_numbers,
)
from fluxmatching.sampling.langevin import check_samples


def exponential_schedule(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Return `[num_steps + 1]` noise levels from sigma_max to sigma_min with equal ratios, float64 (Algorithm 3)."""
    check_num_steps("exponential_schedule", num_steps)
    check_sigma_range("exponential_schedule", sigma_min, sigma_max)
    return _linspace(math.log(sigma_max), math.log(sigma_min), num_steps + 1).exp()


def karras_schedule(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return `[num_steps + 1]` noise levels, float64: σ^(1/ρ) in equal steps from sigma_max to sigma_min, then 0.

    Karras et al. (2022, Eq. 5): ρ = 7 puts most levels at small σ.
    """
    check_num_steps("karras_schedule", num_steps)
    check_sigma_range("karras_schedule", sigma_min, sigma_max)
    rho = check_positive("karras_schedule", "rho", rho)
    powers = _linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)
    return torch.cat([powers**rho, powers.new_zeros(1)])


def _linspace(start: float, end: float, count: int) -> Tensor:
    # On the CPU wherever the samples are: a sampler reads the levels as numbers.
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def check_levels(function: str, x: Tensor, sigmas: Tensor) -> list[float]:
    """Check samples and noise levels of a sampler, and return the levels as numbers."""
    check_samples(function, x)
    check_tensor(function, "sigmas", sigmas)
    check_finite(function, sigmas=sigmas)
    levels = read_numbers(function, "sigmas", sigmas) if sigmas.ndim == 1 else []
    if len(levels) < 2 or not all(above > below for above, below in pairwise(levels)) or not levels[-1] >= 0:
        raise ValueError(f"{function}: sigmas must be at least two decreasing non-negative numbers, got {sigmas}")
    return levels
