"""Direct checks of stationarity: histograms, probability current, and the Fokker-Planck residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from experiments.common.mixture import GaussianMixture

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bins:
    """`count` × `count` square bins on [-limit, limit]², and one bin for everything outside."""

    limit: float
    count: int

    @property
    def width(self) -> float:
        """Side of a bin."""
        return 2 * self.limit / self.count

    def edges(self) -> Tensor:
        """Return the edges, `[count + 1]`."""
        return torch.linspace(-self.limit, self.limit, self.count + 1, dtype=torch.float64)

    def centers(self) -> Tensor:
        """Return the centers, `[count]`."""
        return self.edges()[:-1] + self.width / 2

    def index(self, x: Tensor) -> Tensor:
        """Return the bin of each point, `[N, 2]` to `[N]`; count² for points outside."""
        cell = ((x + self.limit) / self.width).floor()
        inside = ((cell >= 0) & (cell < self.count)).all(-1)
        cell = cell.clamp(0, self.count - 1).long()
        return torch.where(inside, cell[:, 0] * self.count + cell[:, 1], self.count**2)

    def histogram(self, x: Tensor) -> Tensor:
        """Return the fraction of the points in each bin, the outside last: `[N, 2]` to `[count² + 1]`, float64."""
        counts = torch.bincount(self.index(x), minlength=self.count**2 + 1)
        return counts.double() / len(x)

    def probabilities(self, mixture: GaussianMixture) -> Tensor:
        """Compute the exact probability of each bin, the outside last: `[count² + 1]`."""
        means = mixture.means.double()
        edges = self.edges().to(means.device)
        z = (edges - means.unsqueeze(-1)) / math.sqrt(mixture.variance)  # [K, 2, count + 1]
        strips = torch.special.ndtr(z).diff(dim=-1)
        inside = torch.einsum("ki,kj->ij", strips[:, 0], strips[:, 1]).flatten() / len(means)
        return torch.cat([inside, (1 - inside.sum()).clamp(min=0).reshape(1)])


def total_variation(p: Tensor, q: Tensor) -> float:
    """Compute ½ Σ_b |p_b - q_b|."""
    return 0.5 * (p - q).abs().sum().item()


class CurrentEstimator:
    """Estimator of the probability current of a stationary process from its path alone.

    In a stationary diffusion the mean of x_{t+d} - x_{t-d}, given x_t, is 2d times the current velocity
    (b - b*)/2 + O(d²), with b the drift forward and b* the drift backward in time. For the diffusion with drift f this
    is f - ∇log p. A reversible process has none.

    Args:
        bins: bins for x_t.
        step_size: time between successive states of the path.
        device: device of the states.
    """

    def __init__(self, bins: Bins, step_size: float, device: torch.device | str = "cpu") -> None:
        self.bins, self.step_size = bins, step_size
        self.visits = torch.zeros(bins.count**2 + 1, dtype=torch.float64, device=device)
        self.moves = torch.zeros(bins.count**2 + 1, 2, dtype=torch.float64, device=device)

    def add(self, before: Tensor, now: Tensor, after: Tensor) -> None:
        """Add three successive states of many chains, `[N, 2]` each."""
        index = self.bins.index(now)
        self.visits += torch.bincount(index, minlength=len(self.visits))
        self.moves.index_add_(0, index, (after - before).double())

    def density(self) -> Tensor:
        """Return the fraction of the visits divided by the area of a bin, `[count, count]`."""
        inside = self.visits[:-1].reshape(self.bins.count, self.bins.count)
        return inside / (self.visits.sum() * self.bins.width**2)

    def current(self) -> Tensor:
        """Compute J = density times mean of (x_{t+d} - x_{t-d}) / 2d, `[count, count, 2]`; zero where never visited."""
        velocity = self.moves[:-1] / self.visits[:-1, None].clamp(min=1) / (2 * self.step_size)
        return self.density().unsqueeze(-1) * velocity.reshape(self.bins.count, self.bins.count, 2)


def field_current(field: Field, mixture: GaussianMixture, bins: Bins, fine: int = 4) -> Tensor:
    """Compute J = p (f - s), averaged over `fine` × `fine` points of each bin, `[count, count, 2]`."""
    n = bins.count * fine
    axis = -bins.limit + (torch.arange(n, dtype=torch.float64) + 0.5) * (bins.width / fine)
    x = torch.cartesian_prod(axis, axis).to(mixture.means)
    current = mixture.log_density(x).exp().unsqueeze(-1) * (field(x) - mixture.score(x))
    return current.double().reshape(bins.count, fine, bins.count, fine, 2).mean((1, 3))


def jacobian(field: Field, x: Tensor) -> Tensor:
    """Compute ∂f_a/∂x_b at each point, `[N, D]` to `[N, D, D]`."""
    return vmap(jacrev(lambda point: field(point.unsqueeze(0))[0]))(x)


def skewness(jacobians: Tensor) -> float:
    """Compute RMS |(J - Jᵀ)/2|_F / RMS |(J + Jᵀ)/2|_F from `[N, D, D]`; 0 for a gradient field."""
    transposed = jacobians.transpose(-1, -2)
    return ((jacobians - transposed).norm() / (jacobians + transposed).norm()).item()


def residual(field: Field, mixture: GaussianMixture, x: Tensor) -> Tensor:
    """Compute r = ∇·f + f·s - Δp/p = ∇·(p (f - s)) / p, zero everywhere iff f keeps p: `[N, 2]` to `[N]`."""
    score = mixture.score(x)
    divergence = jacobian(lambda z: field(z) - mixture.score(z), x).diagonal(dim1=-2, dim2=-1).sum(-1)
    return divergence + ((field(x) - score) * score).sum(-1)


def root_mean_square(values: Tensor) -> float:
    """Compute the RMS length of vectors `[N, D]`, or the RMS of numbers `[N]`."""
    return math.sqrt(values.double().square().sum().item() / len(values))


def causal_solution(mixture: GaussianMixture, x: Tensor) -> Tensor:
    """Compute the one causal field that leaves a 2-D Gaussian mixture in place, `[N, 2]` to `[N, 2]`.

    f_1(x_1) = (log p_1)', since otherwise the marginal of x_1 would change. A current along x_2 that vanishes far out
    must balance the divergence of the current p (f_1 - s_1) along x_1:

        f_2(x_1, x_2) = s_2 + ∂_1 (p_1 ∂_1 F(x_2 | x_1)) / p,

    F the distribution function of x_2 given x_1. With w_k the weight of component k given x_1, m_1 and v_1 the
    mean and variance of the first coordinates of μ_k under w, and Φ_k the normal distribution function of
    (x_2 - μ_k2)/ν, the fraction is Σ_k w_k Φ_k [(μ_k1 - x_1)(μ_k1 - m_1) - v_1] / (ν² p(x_2 | x_1)) / ν².
    """
    means, variance = mixture.means, mixture.variance
    first, second = x[:, :1], x[:, 1:]
    weight = ((first - means[:, 0]).square() / (-2 * variance)).softmax(-1)
    mean = (weight * means[:, 0]).sum(-1, keepdim=True)
    spread = (weight * (means[:, 0] - mean).square()).sum(-1, keepdim=True)
    z = (second - means[:, 1]) / math.sqrt(variance)
    below = torch.special.ndtr(z)
    # The brackets' mean under w is zero, so Φ may be shifted: by -1 in the upper half, which avoids a cancellation.
    upper = (weight * below).sum(-1, keepdim=True) > 0.5
    shifted = torch.where(upper, -torch.special.ndtr(-z), below)
    bracket = (means[:, 0] - first) * (means[:, 0] - mean) - spread
    conditional = (weight * torch.exp(-z.square() / 2)).sum(-1, keepdim=True) / math.sqrt(2 * math.pi * variance)
    back = (weight * shifted * bracket).sum(-1, keepdim=True) / (variance**2 * conditional)
    return torch.cat([(mean - first) / variance, mixture.score(x)[:, 1:] + back], dim=-1)
