"""Drifts that are linear in their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Functions of single coordinates: 1, z_j = (x_j - center_j)/scale_j and, if nonlinear, tanh x_j.

    Attributes:
        center, scale: mean and standard deviation of the data, `[d]`.
        nonlinear: whether the tanh belong to it.
    """

    center: Tensor
    scale: Tensor
    nonlinear: bool

    @classmethod
    def of(cls, x: Tensor, nonlinear: bool) -> Basis:
        """Make the basis that suits data `[n, d]`."""
        return cls(x.mean(0), x.std(0), nonlinear)

    def single(self) -> Basis:
        """Return the basis in float32."""
        return Basis(self.center.float(), self.scale.float(), self.nonlinear)

    @property
    def coordinates(self) -> Tensor:
        """Coordinate on which each function depends, `[P]`; -1 for the constant."""
        each = torch.arange(len(self.scale))
        return torch.cat([torch.tensor([-1]), *[each] * (1 + self.nonlinear)])

    @property
    def allowed(self) -> Tensor:
        """Return which functions enter each entry of a drift, bool `[d, P]`.

        A constant, the own coordinate z_i, and z_j or, if nonlinear, tanh x_j of the others.
        """
        d = len(self.scale)
        own = torch.eye(d, dtype=torch.bool)
        constant = torch.ones(d, 1, dtype=torch.bool)
        return torch.cat([constant, own, ~own] if self.nonlinear else [constant, own | ~own], 1)

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Entry of the drift and function of each of the Q parameters that are allowed, `[Q]` and `[Q]`."""
        rows, functions = self.allowed.nonzero(as_tuple=True)
        return rows, functions

    def full(self, theta: Tensor) -> Tensor:
        """Return parameters `[..., Q]` as `[..., d, P]`, zero where none is allowed."""
        allowed = self.allowed
        found = theta.new_zeros(*theta.shape[:-1], *allowed.shape)
        found[..., allowed] = theta
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values at x `[..., d]`, `[..., P]`."""
        z = (x - self.center) / self.scale
        return torch.cat([torch.ones_like(z[..., :1]), z, *([x.tanh()] if self.nonlinear else [])], -1)

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative of each function in its coordinate at x `[n, d]`, each `[n, P]`."""
        zero, one = torch.zeros_like(x[:, :1]), (1 / self.scale).expand(x.shape)
        first, second = [zero, one], [zero, torch.zeros_like(x)]
        if self.nonlinear:
            slope = 1 - x.tanh().square()
            first.append(slope)
            second.append(-2 * x.tanh() * slope)
        return torch.cat(first, 1), torch.cat(second, 1)


@dataclass(frozen=True)
class BasisDrift:
    """Drift f_i(x) = s_i Σ_p θ_ip b_p(x), s the scale of the basis.

    Attributes:
        basis: b.
        theta: θ, `[..., d, P]`.
    """

    basis: Basis
    theta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the drift at x `[..., n, d]`, with the leading dimensions of θ."""
        return self.basis.scale * (self.basis(x) @ self.theta.mT)

    def single(self) -> BasisDrift:
        """Return the drift in float32."""
        return BasisDrift(self.basis.single(), self.theta.float())

    def strengths(self, x: Tensor) -> Tensor:
        """Return the standard deviation over x `[n, d]` of the part of f_i/s_i that depends on x_j, `[d, d]`."""
        values, coordinates = self.basis(x), self.basis.coordinates
        centered = values - values.mean(0)
        parts = [
            (centered[:, coordinates == j] @ self.theta[:, coordinates == j].T).square().mean(0).sqrt()
            for j in range(x.shape[1])
        ]
        return torch.stack(parts, 1)
