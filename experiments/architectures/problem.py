"""Images whose law is known: a mixture of smooth Gaussian images, with all derivatives of its score in closed form.

An image is one of four waves m_k plus a smooth normal image with covariance C. With noise σ the covariance is
Σ = C + σ² I. With a_k = Σ⁻¹ m_k, the shares w_k(x) of the waves given x, and means ⟨·⟩ under w:

    s = ⟨a⟩ - Σ⁻¹ x        J_s = ⟨b bᵀ⟩ - Σ⁻¹, b_k = a_k - ⟨a⟩        ∇(εᵀ J_s ε) = ⟨b (ε·b)²⟩        ∇(∇·s) = ⟨b |b|²⟩
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

SIZE = 8  # pixels of a side
PIXELS = SIZE * SIZE
WAVE = 1.1  # amplitude of the waves
LENGTH, VARIANCE, JITTER = 1.5, 0.36, 0.01  # correlation length and variance; independent noise of the pixels


def waves() -> Tensor:
    """Half a wave along the rows or the columns, with either sign: m_k, `[4, 64]`, float64."""
    half = WAVE * (math.pi / SIZE * (torch.arange(SIZE).double() + 0.5)).cos()
    down, across = half[:, None].expand(SIZE, SIZE), half[None].expand(SIZE, SIZE)
    return torch.stack([down, -down, across, -across]).flatten(1)


def places() -> Tensor:
    """Row and column of every pixel, `[64, 2]`, float64."""
    axis = torch.arange(SIZE).double()
    return torch.cartesian_prod(axis, axis)


def covariance() -> Tensor:
    """C, `[64, 64]`, float64."""
    smooth = (torch.cdist(places(), places()).square() / (-2 * LENGTH**2)).exp()
    return VARIANCE * smooth + JITTER * torch.eye(PIXELS).double()


def spread() -> float:
    """Root mean square of the pixels."""
    return (covariance().diagonal().mean() + waves().square().mean()).sqrt().item()


def draw_images(count: int, generator: torch.Generator) -> Tensor:
    """Draw images, `[count, 1, 8, 8]`, float64."""
    normal = torch.randn(count, PIXELS, generator=generator, dtype=torch.float64)
    component = torch.randint(4, (count,), generator=generator)
    images = waves()[component] + normal @ torch.linalg.cholesky(covariance()).T
    return images.reshape(count, 1, SIZE, SIZE)


class ExactScore:
    """Score of the images with noise, a `fluxmatching.ClosedForm`, in the dtype of its argument.

    Args:
        sigma: noise level σ.

    Shape:
        z `[n, 1, 8, 8]`; returns the shape of z.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    @cached_property
    def precision(self) -> Tensor:
        """Σ⁻¹, `[64, 64]`, float64."""
        return torch.linalg.inv(covariance() + self.sigma**2 * torch.eye(PIXELS).double())

    @cached_property
    def tilts(self) -> Tensor:
        """a_k, `[4, 64]`, float64."""
        return waves() @ self.precision

    def shares(self, x: Tensor) -> Tensor:
        """w_k at points `[n, 64]`, `[n, 4]`."""
        tilts = self.tilts.to(x)
        return (x @ tilts.T - (tilts * waves().to(x)).sum(1) / 2).softmax(1)

    def __call__(self, z: Tensor) -> Tensor:
        x = z.flatten(1)
        return (self.shares(x) @ self.tilts.to(x) - x @ self.precision.to(x)).reshape(z.shape)

    def about_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return w_k `[n, 4]` and b_k `[n, 4, 64]` at points `[n, 64]`."""
        share, tilts = self.shares(x), self.tilts.to(x)
        return share, tilts - (share @ tilts).unsqueeze(1)

    def jacobian(self, z: Tensor) -> Tensor:
        """J_s, `[n, 64, 64]`, symmetric."""
        share, b = self.about_mean(z.flatten(1))
        return torch.einsum("nk,nki,nkj->nij", share, b, b) - self.precision.to(z)

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (∇(∇·s) + J_sᵀ v, s), v = `score`; with a probe ε, ∇(εᵀ J_s ε) in place of ∇(∇·s)."""
        share, b = self.about_mean(z.flatten(1))
        squares = b.square().sum(2) if probe is None else (b * probe.flatten(1).unsqueeze(1)).sum(2).square()
        rise = torch.einsum("nk,nk,nki->ni", share, squares, b)
        moved = torch.einsum("nij,nj->ni", self.jacobian(z), score.flatten(1))
        return (rise + moved).reshape(z.shape), self(z)
