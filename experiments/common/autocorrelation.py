"""Memory of a Markov chain: the integrated autocorrelation time."""

from __future__ import annotations

import torch
from torch import Tensor


def integrated_autocorrelation_time(values: Tensor, window: float = 5.0) -> float:
    """Estimate 1 + 2 Σ_k ρ(k) in steps, the sum cut at the first k ≥ window · time (Sokal 1997).

    The result is the number of steps that make one independent draw: 1 for a chain of independent draws, less for
    antithetic steps. ρ is averaged over chains.

    Args:
        values: one number per state of the stationary chains, `[steps, chains]`.
        window: c; larger is less biased and noisier.

    Raises:
        ValueError: the chains are too short for the cut, so their time is unknown.
    """
    if not values.isfinite().all():
        raise ValueError("integrated_autocorrelation_time: values must be finite")
    values, steps = values.cpu(), values.shape[0]
    centered = (values - values.mean()).double()
    spectrum = torch.fft.rfft(centered, 2 * steps, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, dim=0)[:steps].mean(1) / torch.arange(steps, 0, -1)
    times = 2 * (covariance / covariance[0]).cumsum(0) - 1
    beyond = torch.arange(steps) >= window * times.clamp_min(1)
    if not beyond.any() or beyond.int().argmax() > steps // 4:
        raise ValueError(f"chains of {steps} steps are too short: their autocorrelation time is about {times[-1]:.0f}")
    return float(times[beyond.int().argmax()])
