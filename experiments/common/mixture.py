"""Equal-weight isotropic Gaussian mixtures: targets whose density, score and samples are exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.common.jet import Jet


def triangle_means(radius: float) -> Tensor:
    """Return vertices of an equilateral triangle of circumradius `radius`, `[3, 2]`, counterclockwise from the top."""
    angles = torch.tensor([90.0, 210.0, 330.0], dtype=torch.float64).deg2rad()
    return radius * torch.stack([angles.cos(), angles.sin()], dim=-1)


class GaussianMixture:
    """p(x) = (1/K) Σ_k N(x; μ_k, ν² I), the density of Eq. 14.

    Such a mixture is the kernel density estimate with reference points μ_k and bandwidth² ν², so the ops of
    `fluxkernels` work on it unchanged with `refs=means` and `sigma2=variance`.

    Args:
        means: component means μ_k, `[K, D]`; their dtype and device are those of every result.
        variance: ν², equal for all components and directions.
    """

    def __init__(self, means: Tensor, variance: float) -> None:
        if means.ndim != 2 or means.shape[0] == 0:
            raise ValueError(f"means must be [K, D] with K > 0, got shape {tuple(means.shape)}")
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance}")
        self.means = means
        self.variance = float(variance)

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def _kernel_logits(self, x: Tensor) -> Tensor:
        # Direct differences: |x|² + |μ|² - 2 x·μ would cancel far from the origin.
        return (x.unsqueeze(-2) - self.means).square().sum(-1) / (-2 * self.variance)

    @property
    def _log_norm(self) -> float:
        return 0.5 * self.dim * math.log(2 * math.pi * self.variance) + math.log(len(self.means))

    def log_density(self, x: Tensor) -> Tensor:
        """Compute log p(x), normalized: `[..., D] -> [...]`."""
        return self._kernel_logits(x).logsumexp(-1) - self._log_norm

    def log_jet(self, x: Tensor) -> Jet:
        """Compute log p with its derivatives at the points x `[D, n]`, as a jet of one function."""
        offset = x.unsqueeze(1) - self.means.T.unsqueeze(-1)
        identity = torch.eye(self.dim, dtype=x.dtype, device=x.device)[..., None, None]
        return Jet(
            offset.square().sum(0) / (-2 * self.variance) - self._log_norm,
            offset / -self.variance,
            lambda: (identity / -self.variance, x.new_zeros(self.dim, 1, 1)),
        ).log_sum()

    def score(self, x: Tensor) -> Tensor:
        """Compute s(x) = (m(x) - x) / ν², with m the posterior mean of μ_k (Eq. 16, 17): `[..., D] -> [..., D]`."""
        posterior = self._kernel_logits(x).softmax(-1)
        return (posterior @ self.means - x) / self.variance

    def sample_means(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Pick component means uniformly, `[*shape, D]`; adding ν·N(0, I) makes exact samples of p."""
        component = torch.randint(len(self.means), shape, generator=generator)
        return self.means[component.to(self.means.device)]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` independent samples `[n, D]`, with a CPU generator, so that devices agree on the draw."""
        mean = self.sample_means((n,), generator)
        noise = torch.randn(n, self.dim, dtype=self.means.dtype, generator=generator).to(self.means.device)
        return mean + math.sqrt(self.variance) * noise
