"""Quality of a field against the exact score: denoising error, and distance of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.architectures.problem import PIXELS, ExactScore, covariance, draw_images, waves
from experiments.common.distances import bures_wasserstein2, wasserstein2
from experiments.common.run import Run
from experiments.common.sampling import on_device
from fluxmatching import exponential_schedule, reverse_ve
from fluxmatching.fields import NoisyField


def noisy(run: Run, count: int, sigma: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Draw images x and points z = x + σ n, `[count, 1, 8, 8]` each, float64, on the run's device."""
    generator = run.generator(*key)
    x = draw_images(count, generator)
    z = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x.to(run.device), z.to(run.device)


def excess(run: Run, field: NoisyField, sigma: float) -> float:
    """Return the squared denoising error over its exact minimum, less one: σ⁴ E|f - s|² / E|z + σ² s - x|²."""
    x, z = noisy(run, run.config.samples, sigma, "denoised", str(sigma))
    score = ExactScore(sigma)(z)
    with torch.no_grad():
        difference = field(z.float(), torch.tensor(sigma, device=z.device)).double() - score
    least = (z + sigma**2 * score - x).square().sum()
    return (sigma**4 * difference.square().sum() / least).item()


def sample(run: Run, field: NoisyField, seed: int) -> Tensor:
    """Generate images from exact samples at σ_max down to σ_min, with the same noise for all fields of a seed."""
    config = run.config
    _, start = noisy(run, config.samples, config.sigma_max, "start", seed)
    sigmas = exponential_schedule(config.sampling_steps, config.sigma_min, config.sigma_max)
    noise = on_device(run.generator("sampling", seed), run.device)
    with torch.no_grad():
        return reverse_ve(field, start.float(), sigmas, generator=noise)


def compare(run: Run, images: Tensor) -> dict[str, float]:
    """Compare generated images with the law at σ_min.

    Returns:
        "pixels", W2 of the fitted Gaussian to that of the law, in 64 dimensions; "waves", W2 to four times as many
        true images in the plane of the waves, which has all four modes.
    """
    sigma = run.config.sigma_min
    flat = images.flatten(1).double().cpu()
    law = covariance() + waves().T @ waves() / len(waves()) + sigma**2 * torch.eye(PIXELS).double()
    plane = waves()[::2] / waves()[::2].norm(dim=1, keepdim=True)
    _, truth = noisy(run, 4 * len(flat), sigma, "truth")
    shift = flat.mean(0).square().sum().item()
    return {
        "pixels": (shift + bures_wasserstein2(flat.T.cov(), law) ** 2) ** 0.5,
        "waves": wasserstein2(flat @ plane.T, truth.flatten(1).cpu() @ plane.T),
    }
