"""How long a Markov chain remembers: the integrated autocorrelation time."""

from __future__ import annotations

import torch
from torch import Tensor


def integrated_autocorrelation_time(values: Tensor, window: float = 5.0) -> float:
    """1 + 2 Σ_k ρ(k) in steps, ρ averaged over chains, the sum cut at the first k ≥ window · time (Sokal 1997).

    As many steps make one independent draw. A chain of independent draws has 1; one with antithetic steps, less.

    Args:
        values: a number of the state, in stationarity, `[steps, chains]`.
        window: c; larger is less biased and noisier.

    Raises:
        ValueError: the chains are too short for the cut, and their time unknown.
    """
    if not values.isfinite().all():
        raise ValueError("integrated_autocorrelation_time: values must be finite")
    values, steps = values.cpu(), values.shape[0]
    centred = (values - values.mean()).double()
    spectrum = torch.fft.rfft(centred, 2 * steps, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, dim=0)[:steps].mean(1) / torch.arange(steps, 0, -1)
    times = 2 * (covariance / covariance[0]).cumsum(0) - 1
    beyond = torch.arange(steps) >= window * times.clamp_min(1)
    if not beyond.any() or beyond.int().argmax() > steps // 4:
        raise ValueError(f"chains of {steps} steps are too short: their autocorrelation time is about {times[-1]:.0f}")
    return float(times[beyond.int().argmax()])
