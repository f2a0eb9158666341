"""Samples of a trained field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fluxmatching import log_sigma_grid, reverse_ve


def sample_reverse_ve(
    field: nn.Module, like: Tensor, steps: int, sigma_min: float, sigma_max: float, generator: torch.Generator
) -> Tensor:
    """As many samples as `like` has, on its device, by the reverse VE sampler from σ_max down to σ_min."""
    start = sigma_max * torch.randn(like.shape, generator=generator)
    noise = torch.Generator(like.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return reverse_ve(field, start.to(like.device), log_sigma_grid(steps, sigma_min, sigma_max), generator=noise)
