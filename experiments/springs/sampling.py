"""Samples of a trained field, by the reverse VE sampler or by the probability flow."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.common.sampling import sample_reverse_ve
from experiments.springs.config import Config
from fluxmatching import exponential_schedule
from fluxmatching.fields import NoisyField, call_field


def euler_flow(field: NoisyField, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sample by Euler's method for the probability flow in log σ: x ← x + σ_k² log(σ_k/σ_{k+1}) f(x, σ_k).

    The published program's sampler, under the name of the reverse VE sampler. It draws no noise after the start.

    Args:
        field: f(x, σ), x `[N, *event]`, σ of shape `[]`.
        x: `[N, *event]`, drawn from N(0, σ_0² I).
        sigmas: decreasing noise levels `[K + 1]`.

    Returns:
        `[N, *event]`, at noise level σ_K.
    """
    with torch.no_grad():
        for sigma, lower in pairwise(sigmas.tolist()):
            level = torch.tensor(sigma, dtype=x.dtype, device=x.device)
            x = x + sigma**2 * math.log(sigma / lower) * call_field(field, x, level)
    return x


def sample(config: Config, field: nn.Module, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw samples from σ_max down to σ_min by the config's sampler, with the shape and device of `like`."""
    steps, ends = config.sampling_steps, (config.sigma_min, config.sigma_max)
    if config.sampler == "reverse":
        return sample_reverse_ve(field, like, steps, *ends, generator)
    start = config.sigma_max * torch.randn(like.shape, generator=generator)
    return euler_flow(field, start.to(like.device), exponential_schedule(steps, *ends))
