"""Images with a known law: three templates, each a disc, plus normal noise of the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.augment.problems import MixtureProblem, make_problem
from experiments.common.mixture import GaussianMixture
from experiments.regions.images import SIZE, draw_discs

CENTERS = ((1.8, 3.5), (5.2, 1.7), (5.2, 5.3))  # row and column of each disc, about an equilateral triangle
NOISE = 0.2  # standard deviation of a pixel
EVENT = (1, SIZE, SIZE)


@dataclass(frozen=True)
class ImageLaw:
    """Mixture of templates `[K, 64]` with noise, and the plane of the templates.

    At the noise level σ it is a mixture with the variance `NOISE`² + σ². Along the plane, spanned by the columns of the
    orthonormal `basis` `[64, 2]`, it is the mixture of the projected templates; across it, independent normal noise.
    """

    templates: Tensor
    basis: Tensor

    def mixture(self, sigma: float) -> GaussianMixture:
        """Return p_σ of flat images."""
        return GaussianMixture(self.templates, NOISE**2 + sigma**2)

    def problem(self, sigma: float) -> MixtureProblem:
        """Return p_σ of coordinates in the plane, with test functions."""
        return make_problem(self.templates @ self.basis, NOISE**2, sigma)

    def sample(self, count: int, sigma: float, generator: torch.Generator) -> Tensor:
        """Draw images of p_σ, `[count, 1, 8, 8]`."""
        return self.mixture(sigma).sample(count, generator).unflatten(1, EVENT)

    def shares(self, images: Tensor) -> Tensor:
        """Return the share of images nearest to each template, `[K]`."""
        nearest = torch.cdist(images.flatten(1), self.templates).argmin(1)
        return torch.bincount(nearest, minlength=len(self.templates)) / len(images)

    def width(self, images: Tensor, sigma: float) -> float:
        """Return the root mean square of a pixel about the nearest template, over that of a component of p_σ."""
        distance = torch.cdist(images.flatten(1), self.templates).amin(1)
        variance = distance.square().mean().item() / self.templates.shape[1]
        return math.sqrt(variance / (NOISE**2 + sigma**2))


def make_law() -> ImageLaw:
    """Make the law: pixels are -1 outside of a disc and 1 inside."""
    templates = (2 * draw_discs(torch.tensor(CENTERS)) - 1).flatten(1)
    return ImageLaw(templates, leading_plane(templates))


def leading_plane(images: Tensor) -> Tensor:
    """Return the two leading principal components of images `[n, *event]`, `[D, 2]`."""
    flat = images.flatten(1)
    return torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:2].T.contiguous()
