"""Distributions with exact scores, and how far chains are from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture, triangle_means

RADIUS, VARIANCE = 1.8, 0.05  # of the means, and of a component of the data
SIGMAS = (0.4, 0.7, 1.0)
SIGMA = 0.7  # of everything that has one noise level
WIDE, GAUSSIAN = "10-D mixture", "16-D Gaussian"
TEST_FUNCTIONS = 32  # per scale


def plane(sigma: float) -> str:
    """Return the name of the mixture in the plane at a noise level."""
    return f"mixture, σ = {sigma:g}"


MIXTURES = (*map(plane, SIGMAS), WIDE)
PROBLEMS = (*MIXTURES, GAUSSIAN)


@dataclass(frozen=True)
class MixtureProblem:
    """A mixture p_σ and test functions whose means under it are known.

    Attributes:
        mixture: p_σ, whose means are those of the data and whose variance is that of a component plus σ².
        sigma: σ.
        frequencies, phases: w `[K, D]` and b `[K]` of the test functions cos(w·x + b).
        truth: their exact means, `[K]`.
    """

    mixture: GaussianMixture
    sigma: float
    frequencies: Tensor
    phases: Tensor
    truth: Tensor

    @property
    def unit(self) -> float:
        """Variance of a component of p_σ, the unit of all step sizes."""
        return self.mixture.variance

    def bias(self, states: Tensor) -> float:
        """Return the root mean square error of the means of the test functions over chains, `[n, chains, D]`.

        The errors of both halves of the chains are multiplied, so that their noise has mean 0; the result is 0 where
        this product is negative.
        """
        errors = [self.errors(half) for half in states.chunk(2, 1)]
        return math.sqrt(max(0.0, (errors[0] * errors[1]).mean().item()))

    def errors(self, states: Tensor) -> Tensor:
        """Return the errors of the means of the test functions, `[K]`."""
        return torch.cos(states.flatten(0, -2) @ self.frequencies.T + self.phases).mean(0) - self.truth


def make_mixture(name: str) -> MixtureProblem:
    """Make one of `MIXTURES`: three modes in the plane, or five in ten dimensions."""
    if name == WIDE:
        return make_problem(simplex_means(5, 10, RADIUS).float(), VARIANCE, SIGMA)
    sigma = next(sigma for sigma in SIGMAS if plane(sigma) == name)
    return make_problem(triangle_means(RADIUS).float(), VARIANCE, sigma)


def make_problem(means: Tensor, variance: float, sigma: float) -> MixtureProblem:
    """Make the problem of a mixture with components of that variance at a noise level.

    Frequencies of the test functions are normal, half of them in inverse standard deviations of p_σ and half in inverse
    standard deviations of a component; in D dimensions times √(2/D), so that no function averages to nothing.
    """
    mixture = GaussianMixture(means, variance + sigma**2)
    generator = torch.Generator().manual_seed(0)
    spread = (means.var(0, unbiased=False) + mixture.variance).sqrt()
    normal = math.sqrt(2 / mixture.dim) * torch.randn(2, TEST_FUNCTIONS, mixture.dim, generator=generator)
    frequencies = torch.cat([normal[0] / spread, normal[1] / math.sqrt(mixture.variance)])
    phases = 2 * math.pi * torch.rand(len(frequencies), generator=generator)
    damping = torch.exp(-mixture.variance / 2 * frequencies.square().sum(1))
    truth = damping * torch.cos(frequencies @ means.T + phases[:, None]).mean(1)
    return MixtureProblem(mixture, sigma, frequencies, phases, truth)


def simplex_means(modes: int, dimensions: int, radius: float) -> Tensor:
    """Return vertices of a regular simplex of circumradius `radius` in a random orientation, `[modes, D]`, float64."""
    corners = torch.eye(modes, dtype=torch.float64) - 1 / modes
    corners = radius * corners / corners[0].norm()
    normal = torch.randn(dimensions, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.pad(corners, (0, dimensions - modes)) @ torch.linalg.qr(normal)[0].T


def gaussian_variances(dimensions: int, condition: float) -> Tensor:
    """Return variances from 1 down to 1/condition, equally spaced in the logarithm, `[D]`, float64."""
    return torch.logspace(0, -math.log10(condition), dimensions, dtype=torch.float64)
