"""The two families of vector fields of Sec. B.1: perturbations of the score that keep p, and their twins.

All controls have the form (rotation of) ∇ψ / p. The templates ψ are handled as log ψ and the quotient as
exp(log ψ - log p) ∇log ψ, so neither a ψ nor a p that underflows far out can turn a field into NaN, and no
clamp is needed, which would break ∇·(p u) = 0. The first derivatives are written out; a field is therefore
differentiable as often as autograd is asked to, with one order less to trace than if the gradient itself
came from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from experiments.common.mixture import GaussianMixture

Family = Literal["preserving", "violating"]
FAMILIES: tuple[Family, ...] = ("preserving", "violating")
CONTROLS = ("rot", "tri", "skew")


def rotate(v: Tensor) -> Tensor:
    """J v with J = [[0, -1], [1, 0]], a quarter turn anticlockwise: `[..., 2] -> [..., 2]`."""
    return torch.stack([-v[..., 1], v[..., 0]], dim=-1)


@dataclass(frozen=True)
class TriangleTemplate:
    """ψ_tri of Eq. 20-23: a ridge along the edges of a triangle and a low plateau inside it.

    Args:
        vertices: v_j, anticlockwise, `[3, 2]`.
    """

    vertices: Tensor
    width: float = 0.24
    kappa: float = 5.0
    beta: float = 10.0
    interior: float = 0.12
    eta: float = 0.9

    def log_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log ψ `[...]` and ∇log ψ `[..., 2]` at x `[..., 2]`."""
        edge = self.vertices.roll(-1, 0) - self.vertices
        length = edge.norm(dim=-1)
        e = edge / length.unsqueeze(-1)
        n = -rotate(e)  # outward, the vertices being anticlockwise
        offset = x.unsqueeze(-2) - self.vertices
        a, d = (offset * e).sum(-1), (offset * n).sum(-1)  # Eq. 20, [..., 3]

        slope = self.kappa / self.width
        start, end = slope * a, slope * (length - a)
        log_ridge = -d.square() / (2 * self.width**2) + logsigmoid(start) + logsigmoid(end)  # Eq. 21
        along = slope * (torch.sigmoid(-start) - torch.sigmoid(-end))
        grad_ridge = along.unsqueeze(-1) * e - (d / self.width**2).unsqueeze(-1) * n  # [..., 3, 2]

        level = (self.beta * d).logsumexp(-1) / self.beta  # h of Eq. 22
        grad_level = (self.beta * d).softmax(-1) @ n
        log_plateau = math.log(self.interior) + logsigmoid(-self.beta * level)
        grad_plateau = -self.beta * torch.sigmoid(self.beta * level).unsqueeze(-1) * grad_level

        # Eq. 23: the bracket is a sum of four positive terms, hence its gradient their softmax-weighted
        # gradients.
        log_terms = torch.cat([log_ridge - math.log(3), log_plateau.unsqueeze(-1)], dim=-1)
        grad_terms = torch.cat([grad_ridge, grad_plateau.unsqueeze(-2)], dim=-2)
        outside = level.relu()
        log_psi = log_terms.logsumexp(-1) - outside.square() / (2 * self.eta**2)
        grad = (log_terms.softmax(-1).unsqueeze(-1) * grad_terms).sum(-2)
        return log_psi, grad - (outside / self.eta**2).unsqueeze(-1) * grad_level


@dataclass(frozen=True)
class SkewTemplate:
    """ψ_skew of Eq. 24-26: an anisotropic bump near the lower right mode, heavier on its outer side."""

    radius: float = 2.3
    angle: float = -20.0
    distance: float = 0.78
    along: float = 0.60
    across: float = 1.05
    bias: float = 0.45
    gamma: float = 1.75

    def log_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log ψ `[...]` and ∇log ψ `[..., 2]` at x `[..., 2]`."""
        alpha = math.radians(self.angle)
        d = x.new_tensor([math.cos(alpha), math.sin(alpha)])
        d_perp = rotate(d)
        r = x - self.distance * self.radius * d
        r_par, r_perp = (r * d).sum(-1), (r * d_perp).sum(-1)  # Eq. 25

        slope = self.gamma / self.radius
        gate = torch.sigmoid(slope * (x * d).sum(-1))
        lift = 1 + self.bias * gate
        log_psi = -0.5 * ((r_par / self.along).square() + (r_perp / self.across).square()) + lift.log()
        grad_par = slope * self.bias * gate * (1 - gate) / lift - r_par / self.along**2
        grad_perp = -r_perp / self.across**2
        return log_psi, grad_par.unsqueeze(-1) * d + grad_perp.unsqueeze(-1) * d_perp


class Controls:
    """The three control directions of both families, of unit RMS norm under p after `normalise`.

    Args:
        mixture: the target p_σ, in the plane.
        triangle: ψ_tri.
        skew: ψ_skew.
    """

    def __init__(self, mixture: GaussianMixture, triangle: TriangleTemplate, skew: SkewTemplate) -> None:
        self.mixture = mixture
        self.triangle = triangle
        self.skew = skew
        self.scales = mixture.means.new_ones(3)
        # c_tri alone carries a minus sign, and only in the preserving family (Eq. 19 against Eq. 29).
        self._signs = mixture.means.new_tensor([1.0, -1.0, 1.0])

    def normalise(self, samples: Tensor) -> Tensor:
        """Set the scale factors of Eq. 31 from samples of p `[S, 2]` and return them `[3]`.

        A rotation keeps the norm, so the factors of the preserving controls are those of their twins as well.
        """
        self.scales = self._quotients(samples).square().sum(-1).mean(0).rsqrt()
        return self.scales

    def _quotients(self, x: Tensor) -> Tensor:
        """(∇p/p, ∇ψ_tri/p, ∇ψ_skew/p), unscaled: `[..., 2] -> [..., 3, 2]`."""
        log_p = self.mixture.log_density(x)
        columns = [self.mixture.score(x)]
        for template in (self.triangle, self.skew):
            log_psi, grad = template.log_and_grad(x)
            columns.append((log_psi - log_p).exp().unsqueeze(-1) * grad)
        return torch.stack(columns, dim=-2)

    def basis(self, x: Tensor, family: Family) -> Tensor:
        """(c_rot, c_tri, c_skew) at x, Eq. 19 or Eq. 29 rescaled by Eq. 31: `[..., 2] -> [..., 3, 2]`."""
        scaled = self.scales.unsqueeze(-1) * self._quotients(x)
        return rotate(scaled) * self._signs.unsqueeze(-1) if family == "preserving" else scaled

    def perturbation(self, x: Tensor, theta: Tensor, family: Family) -> Tensor:
        """u_θ(x) = Σ_k θ_k c_k(x), Eq. 18 or 30: `[..., 2] -> [..., 2]`, θ `[3]`."""
        return (theta.unsqueeze(-1) * self.basis(x, family)).sum(-2)

    def field(self, theta: Tensor, family: Family) -> Callable[[Tensor], Tensor]:
        """f_θ = s_σ + u_θ (Eq. 18) as a function of points `[..., 2]`."""
        return lambda x: self.mixture.score(x) + self.perturbation(x, theta, family)

    def stream(self, x: Tensor) -> Tensor:
        """Ψ_k with p c_k = J∇Ψ_k for the preserving controls: `[..., 2] -> [..., 3]`.

        p u_θ = J∇(Σ_k θ_k Ψ_k), with Ψ = scale · (p, -ψ_tri, ψ_skew).
        """
        logs = [self.mixture.log_density(x), self.triangle.log_and_grad(x)[0], self.skew.log_and_grad(x)[0]]
        return self.scales * self._signs * torch.stack(logs, dim=-1).exp()
