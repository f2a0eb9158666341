"""Fréchet distance on fixed random convolutions: always available; not the FID and not comparable with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.common.distances import bures_wasserstein2
from fluxkernels import philox

CHANNELS = 32  # of each convolution
SCALES = 3  # the image, half and a quarter of its size


def random_convolutions(images: Tensor, batch: int = 500) -> Tensor:
    """Untrained features, 384 numbers per image: the extractor "random convolutions".

    At each of three scales the image is halved zero, one or two times by averaging 2 × 2 pixels, goes through two 3 × 3
    convolutions of 32 channels with ReLU, and is averaged over its four quadrants. The weights are normal numbers of
    variance 2/(inputs) from Philox with seeds 0 and 1, so they are the same on every machine. Untrained features detect
    textures, colors and coarse layout, but not objects (Naeem et al. 2020 use random networks in this way).

    Args:
        images: numbers in [-1, 1], `[n, 3, height, width]`, height and width at least 8.
        batch: number of images per pass.

    Returns:
        `[n, 384]`, float64, on the CPU.
    """
    weights = [_weights(step, inputs, images.device) for step, inputs in enumerate((3, CHANNELS))]
    parts = []
    for x in images.split(batch):
        found = []
        for scale in range(SCALES):
            y = F.avg_pool2d(x, 2**scale) if scale else x
            for weight in weights:
                y = F.conv2d(y, weight, padding=1).relu()
            found.append(F.adaptive_avg_pool2d(y, 2).flatten(1))
        parts.append(torch.cat(found, 1).double().cpu())
    return torch.cat(parts)


def _weights(step: int, inputs: int, device: torch.device) -> Tensor:
    seed = torch.tensor(step, device=device)
    numbers = philox.normal(seed, (1, CHANNELS, inputs, 3, 3), philox.START, torch.float32)[0]
    return numbers * math.sqrt(2 / (9 * inputs))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """W2² between the Gaussians fitted to two samples, |μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^½).

    Args:
        x, y: features, `[n, D]` and `[m, D]`. Few samples give too large a value, so compare equal numbers of them.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"frechet_distance: x and y must have at least 2 samples, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return means.item() + bures_wasserstein2(torch.cov(x.T), torch.cov(y.T)) ** 2
