"""Samples of a field."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxmatching import exponential_schedule, reverse_ve
from fluxmatching.fields import NoisyField


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Make a generator of the device, seeded by the next draw of one of the CPU."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def sample_reverse_ve(
    field: NoisyField, like: Tensor, num_steps: int, sigma_min: float, sigma_max: float, generator: torch.Generator
) -> Tensor:
    """Draw samples by the reverse VE sampler from σ_max down to σ_min, with the shape and device of `like`."""
    start = sigma_max * torch.randn(like.shape, generator=generator)
    noise = on_device(generator, like.device)
    return reverse_ve(
        field, start.to(like.device), exponential_schedule(num_steps, sigma_min, sigma_max), generator=noise
    )
