"""Samples of a trained field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fluxmatching import log_sigma_grid, reverse_ve


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator of the device that goes on from one of the CPU, and is independent of what that one drew."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def sample_reverse_ve(
    field: nn.Module, like: Tensor, steps: int, sigma_min: float, sigma_max: float, generator: torch.Generator
) -> Tensor:
    """As many samples as `like` has, on its device, by the reverse VE sampler from σ_max down to σ_min."""
    start = sigma_max * torch.randn(like.shape, generator=generator)
    noise = on_device(generator, like.device)
    return reverse_ve(field, start.to(like.device), log_sigma_grid(steps, sigma_min, sigma_max), generator=noise)
