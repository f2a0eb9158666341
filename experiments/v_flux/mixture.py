"""The path from noise to a Gaussian mixture in the plane, with fields that carry it in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from fluxmatching.flows.paths import Coefficients, Path


class ComponentPath(Path):
    """The linear path to a Gaussian mixture, as a path to the means of its components: α = t, σ² = (1-t)² + ν² t².

    For data x1 = μ + ν n, t x1 + (1-t) x0 has the distribution of t μ + σ(t) x0. So p_t is the kernel density estimate
    with the means as reference points, exactly.

    Args:
        variance: ν², variance of a component.
    """

    def __init__(self, variance: float) -> None:
        self.variance = variance

    def coefficients(self, t: Tensor) -> Coefficients:
        sigma = ((1 - t).square() + self.variance * t.square()).sqrt()
        product = self.variance * t - (1 - t)
        return Coefficients(t, sigma, torch.ones_like(t), product / sigma, product)


class MixtureFlow:
    """Marginals p_t of x_t = t x1 + (1-t) x0, x0 standard normal and x1 from a Gaussian mixture in the plane.

    The fields take x `[N, 2]` and t `[N]`, compute in float64 and return the dtype of x.

    Args:
        means: μ, means of the components, of equal weight, `[K, 2]`.
        variance: ν², variance of a component.
    """

    def __init__(self, means: Tensor, variance: float) -> None:
        self.means, self.variance = means.double(), variance
        self.path = ComponentPath(variance)

    def at(self, t: float) -> GaussianMixture:
        """Return p_t."""
        sigma = self.path.coefficients(torch.tensor(t, dtype=torch.float64)).sigma
        return GaussianMixture(t * self.means, sigma.square().item())

    def sample(self, t: float, count: int, generator: torch.Generator) -> Tensor:
        """Draw from p_t, `[count, 2]`, float32."""
        return self.at(t).sample(count, generator).float()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute the marginal velocity v = E[μ + σ' (x - t μ)/σ | x], a gradient: `[N, 2]` to `[N, 2]`."""
        return self._velocity(x, t).to(x.dtype)

    def causal(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute the causal field that carries p_t: `[N, 2]` to `[N, 2]`.

        f_1(x_1) is the marginal velocity of the first coordinate alone. f_2 moves each point so that its quantile
        F(x_2 | x_1) stays. With w_k the weight of component k given x_1, z_k = (x_2 - t μ_k2)/σ, φ and Φ the normal
        density and distribution function, and ẇ_k the derivative of w_k along dx_1/dt = f_1,

            f_2 = v_2 - σ Σ_k ẇ_k Φ(z_k) / Σ_k w_k φ(z_k).
        """
        z, c = self._standardized(x, t)
        z1, z2 = z.unbind(1)
        first = self._velocity(x[:, :1], t)
        log_weight = (z1.square() / -2).log_softmax(-1)
        # The derivative of -z_1²/2 along dx_1/dt = f_1, less its mean under w.
        log_rate = -z1 * (first - c.alpha_rate * self.means[:, 0] - c.sigma_rate * z1) / c.sigma
        weight = log_weight.exp()
        rate = weight * (log_rate - (weight * log_rate).sum(-1, keepdim=True))
        # Σ ẇ_k = 0, so Φ may be replaced by -Φ(-z) in the upper half, which avoids a cancellation.
        side = torch.where((weight * z2).sum(-1, keepdim=True) > 0, -1.0, 1.0).to(z2)
        log_density = (log_weight - z2.square() / 2).logsumexp(-1, keepdim=True) - math.log(2 * math.pi) / 2
        below = (torch.special.log_ndtr(side * z2) - log_density).exp()
        back = side * c.sigma * (rate * below).sum(-1, keepdim=True)
        return torch.cat([first, self._velocity(x, t)[:, 1:] - back], 1).to(x.dtype)

    def masked_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute (E[v_1 | x_1], v_2), the minimum of conditional flow matching among causal fields; misses p_t."""
        return torch.cat([self._velocity(x[:, :1], t), self._velocity(x, t)[:, 1:]], 1).to(x.dtype)

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the marginal velocity of the first D coordinates alone, `[N, D]`, float64."""
        z, c = self._standardized(x, t)
        posterior = (z.square().sum(1) / -2).softmax(-1).unsqueeze(1)
        means = self.means.T[: x.shape[1]]
        return (posterior * (c.alpha_rate.unsqueeze(-1) * means + c.sigma_rate.unsqueeze(-1) * z)).sum(-1)

    def _standardized(self, x: Tensor, t: Tensor) -> tuple[Tensor, Coefficients]:
        """Return (x - t μ_k)/σ, `[N, D, K]`, and the path's coefficients, `[N, 1]`."""
        x = x.double()
        c = self.path.coefficients(t.double()).reshape_for(x)
        return (x.unsqueeze(-1) - c.alpha.unsqueeze(-1) * self.means.T[: x.shape[1]]) / c.sigma.unsqueeze(-1), c
