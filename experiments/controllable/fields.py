"""The two families of vector fields of Sec. B.1: perturbations of the score that keep p, and counterparts that do not.

All controls have the form (rotation of) ∇ψ / p. The code works with log ψ and takes the quotient as
exp(log ψ - log p) ∇log ψ. A ψ or p that underflows far out therefore never makes NaN, and no clamp is needed, which
would break ∇·(p u) = 0. All derivatives are in closed form, by `Jet`, and the flux loss uses them. Autograd can
differentiate a field any number of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.common.jet import Jet, linear, log_gaussian, log_sigmoid, log_sigmoid_below, product
from experiments.common.mixture import GaussianMixture
from experiments.common.rotation import quarter_turn

Family = Literal["preserving", "violating"]
FAMILIES: tuple[Family, ...] = ("preserving", "violating")
CONTROLS = ("rot", "tri", "skew")
# Points evaluated at once: few enough for the temporaries to stay in the cache.
BLOCK = 4096


def turn(v: Tensor, family: Family) -> Tensor:
    """Compute R v, with R a quarter turn (preserving) or the identity (violating): `[2, ...]`."""
    return quarter_turn(v, 0) if family == "preserving" else v


def points_last(x: Tensor) -> Tensor:
    """Reshape points as a `Jet` takes them: `[..., 2] -> [2, n]`, contiguous."""
    return x.movedim(-1, 0).reshape(2, -1).contiguous()


class Template:
    """Positive function ψ on the plane, given by its logarithm."""

    def log_jet(self, x: Tensor) -> Jet:
        """Compute log ψ with its derivatives at the points x `[2, n]`, as a jet of one function."""
        raise NotImplementedError

    def log_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log ψ `[...]` and ∇log ψ `[..., 2]` at x `[..., 2]`."""
        jet = self.log_jet(points_last(x))
        return jet.value.reshape(x.shape[:-1]), jet.gradient[:, 0].T.reshape(x.shape)


@dataclass(frozen=True)
class TriangleTemplate(Template):
    """ψ_tri of Eq. 20-23: a ridge along the edges of a triangle and a low plateau inside it.

    Args:
        vertices: v_j, counterclockwise, `[3, 2]`.
    """

    vertices: Tensor
    width: float = 0.24
    kappa: float = 5.0
    beta: float = 10.0
    interior: float = 0.12
    eta: float = 0.9

    def log_jet(self, x: Tensor) -> Jet:
        vertices = self.vertices.T  # vectors along the first dimension, the three edges along the second
        edge = vertices.roll(-1, 1) - vertices
        length = edge.norm(dim=0)
        e = edge / length
        n = -quarter_turn(e, 0)  # outward, the vertices being counterclockwise
        a, d = (u.T @ x - (u * vertices).sum(0).unsqueeze(-1) for u in (e, n))  # Eq. 20, [3, n]

        slope = self.kappa / self.width
        end = (slope * length).unsqueeze(-1)

        def gates(t: Tensor) -> tuple[Tensor, ...]:
            return tuple(u + v for u, v in zip(log_sigmoid(t), log_sigmoid_below(t - end), strict=True))

        def fade(t: Tensor) -> tuple[Tensor | float, ...]:
            value, first, second, third = log_gaussian(self.beta * self.eta)(t.relu())
            return value, first, second * (t > 0).to(t.dtype), third

        ridges = Jet.along(slope * e, slope * a, gates) + Jet.along(n, d, log_gaussian(self.width))  # Eq. 21
        level = Jet.along(self.beta * n, self.beta * d, linear).log_sum()  # β h, Eq. 22
        plateau = level.through(log_sigmoid_below)
        inside = Jet.cat(ridges.times(1 / 3), plateau.times(self.interior)).log_sum()
        return inside + level.through(fade)  # Eq. 23


@dataclass(frozen=True)
class SkewTemplate(Template):
    """ψ_skew of Eq. 24-26: an anisotropic bump near the lower right mode, heavier on its outer side."""

    radius: float = 2.3
    angle: float = -20.0
    distance: float = 0.78
    along: float = 0.60
    across: float = 1.05
    bias: float = 0.45
    gamma: float = 1.75

    def log_jet(self, x: Tensor) -> Jet:
        alpha = math.radians(self.angle)
        d = x.new_tensor([[math.cos(alpha)], [math.sin(alpha)]])
        d_perp = quarter_turn(d, 0)
        t, t_perp = (x * d).sum(0, keepdim=True), (x * d_perp).sum(0, keepdim=True)

        bump = Jet.along(d, t - self.distance * self.radius, log_gaussian(self.along))  # Eq. 25
        bump = bump + Jet.along(d_perp, t_perp, log_gaussian(self.across))
        slope = self.gamma / self.radius
        return bump + Jet.along(slope * d, slope * t, self._log_lift)

    def _log_lift(self, t: Tensor) -> tuple[Tensor, ...]:
        """Compute log(1 + bias · S(t)) = log S(-t) - log S(-t - log(1 + bias)), S the sigmoid."""
        below, further = log_sigmoid_below(t), log_sigmoid_below(t + math.log1p(self.bias))
        return tuple(u - v for u, v in zip(below, further, strict=True))


class Controls:
    """The three control directions of both families, of unit RMS norm under p after `normalize`.

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

    def normalize(self, samples: Tensor) -> Tensor:
        """Set the scale factors of Eq. 31 from samples of p `[S, 2]` and return them `[3]`.

        A rotation keeps the norm, so both families have the same factors.
        """
        self.scales = torch.ones_like(self.scales)
        self.scales = self.basis(samples, "violating").square().sum(-1).mean(0).rsqrt()
        return self.scales

    def factors(self, family: Family) -> Tensor:
        """Return the factor of each control: its scale, and in the preserving family its sign, `[3]`."""
        return self.scales * self._signs if family == "preserving" else self.scales

    def log_jets(self, x: Tensor) -> tuple[Jet, Jet]:
        """Compute log p, and (log p, log ψ_tri, log ψ_skew) as three functions, at the points x `[2, n]`."""
        log_p = self.mixture.log_jet(x)
        return log_p, Jet.cat(log_p, self.triangle.log_jet(x), self.skew.log_jet(x))

    def basis(self, x: Tensor, family: Family) -> Tensor:
        """Compute (c_rot, c_tri, c_skew) at x, Eq. 19 or Eq. 29 rescaled by Eq. 31: `[..., 2] -> [..., 3, 2]`."""
        log_p, log_psi = self.log_jets(points_last(x))
        weights = self.factors(family).unsqueeze(-1) * (log_psi.value - log_p.value).exp()
        return (weights * turn(log_psi.gradient, family)).permute(2, 1, 0).reshape(*x.shape[:-1], 3, 2)

    def field(self, theta: Tensor, family: Family) -> Field:
        """Make f_θ = s_σ + u_θ (Eq. 18 or 30), θ `[3]`."""
        return Field(self, theta, family)

    def stream(self, x: Tensor) -> Tensor:
        """Compute Ψ_k with p c_k = J∇Ψ_k for the preserving controls: `[..., 2] -> [..., 3]`.

        p u_θ = J∇(Σ_k θ_k Ψ_k), with Ψ = scale · (p, -ψ_tri, ψ_skew).
        """
        psi = self.log_jets(points_last(x))[1].value.exp()
        return self.factors("preserving") * psi.T.reshape(*x.shape[:-1], 3)


@dataclass(frozen=True)
class Field:
    """f = s + Σ_k g_k e^{a_k} R∇b_k at points `[..., 2]`, with the derivatives that the flux loss needs.

    b = (log p, log ψ_tri, log ψ_skew), a_k = b_k - log p, g_k is θ_k times the control's scale and sign, and R a
    quarter turn (preserving) or the identity (violating).
    """

    controls: Controls
    theta: Tensor
    family: Family

    def __call__(self, x: Tensor) -> Tensor:
        values = [self._value(points) for points in points_last(x).split(BLOCK, 1)]
        return torch.cat(values, 1).T.reshape(x.shape)

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute ∇(∇·f) + J_fᵀ s and f, each of the shape of z; see `fluxmatching.losses.second_derivatives`.

        Raises:
            ValueError: a probe is given; the closed form is of the exact divergence.
        """
        if probe is not None:
            raise ValueError("the controllable fields have a closed form of divergence='exact' alone")
        blocks = zip(points_last(z).split(BLOCK, 1), points_last(score).split(BLOCK, 1), strict=True)
        gradients, values = zip(*(self._gradient_and_value(*block) for block in blocks), strict=True)
        return torch.cat(gradients, 1).T.reshape(z.shape), torch.cat(values, 1).T.reshape(z.shape)

    def _value(self, x: Tensor) -> Tensor:
        log_p, b = self.controls.log_jets(x)
        return log_p.gradient[:, 0] + (self._weights(log_p, b) * turn(b.gradient, self.family)).sum(1)

    def _gradient_and_value(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the product rule. With B, A and H the Hessians of b, a and log p it gives for a control e^a R∇b

            e^a [ ∇a (R∇b·(∇a + s) + tr RB) + A R∇b + B Rᵀ(∇a + s) + ∇ tr RB ],        A = B - H,

        where tr RB is Δb for the identity, and 0 for a quarter turn because B is symmetric. The terms in H add up to
        -H u. `[2, n]` each.
        """
        log_p, b = self.controls.log_jets(z)
        s = score.unsqueeze(1)
        weights, turned = self._weights(log_p, b), turn(b.gradient, self.family)
        slope = b.gradient - log_p.gradient
        pulled = slope + s
        if self.family == "preserving":
            terms = slope * (turned * pulled).sum(0) + product(b.hessian, turned - quarter_turn(pulled, 0))
        else:
            terms = slope * ((turned * pulled).sum(0) + b.laplacian) + product(b.hessian, turned + pulled)
            terms = terms + b.laplacian_gradient
        u = (weights * turned).sum(1, keepdim=True)
        gradient = log_p.laplacian_gradient + product(log_p.hessian, s - u) + (weights * terms).sum(1, keepdim=True)
        return gradient[:, 0], (log_p.gradient + u)[:, 0]

    def _weights(self, log_p: Jet, b: Jet) -> Tensor:
        """Compute g_k e^{a_k}, `[3, n]`."""
        return (self.theta * self.controls.factors(self.family)).unsqueeze(-1) * (b.value - log_p.value).exp()
