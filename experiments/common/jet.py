"""Derivatives of log-densities up to ∇Δb in closed form, as ∇(∇·f) of a field made of them needs.

Autograd can compute them too, but takes many times as long: it traces every order through the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# A function of one variable: t -> (φ, φ′, φ″, φ‴), tensors of the shape of t, or a number for a constant derivative.
Univariate = Callable[[Tensor], tuple[Any, ...]]


def log_sigmoid(t: Tensor) -> tuple[Tensor, ...]:
    """Compute log S(t) with S(t) = 1/(1 + e^{-t}), without overflow anywhere."""
    below = torch.sigmoid(-t)
    slope = below * (1 - below)
    return logsigmoid(t), below, -slope, slope * (1 - 2 * below)


def log_sigmoid_below(t: Tensor) -> tuple[Tensor, ...]:
    """Compute log S(-t) = log(1 - S(t))."""
    above = torch.sigmoid(t)
    slope = above * (1 - above)
    return logsigmoid(-t), -above, -slope, slope * (2 * above - 1)


def log_gaussian(width: float) -> Univariate:
    """Return t -> -t²/2w²."""
    precision = 1 / width**2
    return lambda t: (-0.5 * precision * t.square(), -precision * t, -precision, 0.0)


def linear(t: Tensor) -> tuple[Tensor | float, ...]:
    """Return t itself."""
    return t, 1.0, 0.0, 0.0


def outer(v: Tensor) -> Tensor:
    """Compute v vᵀ: `[D, K, n] -> [D, D, K, n]`."""
    return v.unsqueeze(0) * v.unsqueeze(1)


def trace(matrix: Tensor) -> Tensor:
    """Compute the trace: `[D, D, K, n] -> [K, n]`."""
    return matrix.diagonal().sum(-1)


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """Compute A v for symmetric A: `[D, D, K, n], [D, K, n] -> [D, K, n]`."""
    return (matrix * v).sum(1)


class Jet:
    """Values, gradients, Hessians and ∇Δb of K functions b of D variables at n points.

    Points come last, so that every operation runs along contiguous memory. The second and third derivatives are
    computed at their first use, so values and gradients alone cost nothing else.

    Args:
        value: b, `[K, n]`.
        gradient: ∇b, `[D, K, n]`.
        higher: makes (Hessian of b `[D, D, K, n]`, ∇Δb `[D, K, n]`).

    Any K or n except those of `value` may be 1, for one value that holds for all.
    """

    def __init__(self, value: Tensor, gradient: Tensor, higher: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.value = value
        self.gradient = gradient
        self._make_higher = higher

    @cached_property
    def _higher(self) -> tuple[Tensor, Tensor]:
        return self._make_higher()

    @property
    def hessian(self) -> Tensor:
        """∂_i ∂_j b."""
        return self._higher[0]

    @property
    def laplacian(self) -> Tensor:
        """Δb, `[K, n]`."""
        return trace(self.hessian)

    @property
    def laplacian_gradient(self) -> Tensor:
        """∇Δb."""
        return self._higher[1]

    @classmethod
    def along(cls, direction: Tensor, t: Tensor, function: Univariate) -> Jet:
        """Make φ(t_k) of the coordinates t_k = v_k·x + const: vectors v `[D, K]`, t `[K, n]`."""
        v = direction.unsqueeze(-1)
        value, first, second, third = function(t)
        return cls(value, first * v, lambda: (second * outer(v), third * (v.square().sum(0) * v)))

    @classmethod
    def cat(cls, *jets: Jet) -> Jet:
        """Concatenate the functions of all jets."""
        return cls(
            torch.cat([jet.value for jet in jets]),
            torch.cat([jet.gradient.expand(-1, *jet.value.shape) for jet in jets], 1),
            lambda: (
                torch.cat([jet.hessian.expand(-1, -1, *jet.value.shape) for jet in jets], 2),
                torch.cat([jet.laplacian_gradient.expand(-1, *jet.value.shape) for jet in jets], 1),
            ),
        )

    def __add__(self, other: Jet) -> Jet:
        return Jet(
            self.value + other.value,
            self.gradient + other.gradient,
            lambda: (self.hessian + other.hessian, self.laplacian_gradient + other.laplacian_gradient),
        )

    def times(self, factor: float) -> Jet:
        """Make log(factor · e^b), which has the derivatives of b."""
        return Jet(self.value + math.log(factor), self.gradient, lambda: (self.hessian, self.laplacian_gradient))

    def through(self, function: Univariate) -> Jet:
        """Make φ(b)."""
        value, first, second, third = function(self.value)
        g = self.gradient

        def higher() -> tuple[Tensor, Tensor]:
            rise = (third * g.square().sum(0) + second * self.laplacian) * g
            rise = rise + 2 * second * product(self.hessian, g) + first * self.laplacian_gradient
            return second * outer(g) + first * self.hessian, rise

        return Jet(value, first * g, higher)

    def log_sum(self) -> Jet:
        """Make the one function log Σ_k e^{b_k}. With w = softmax b all its derivatives are moments under w."""
        largest = self.value.detach().amax(0, keepdim=True)
        share = (self.value - largest).exp()
        total = share.sum(0, keepdim=True)
        w = share / total
        gradient = (w * self.gradient).sum(1, keepdim=True)

        def higher() -> tuple[Tensor, Tensor]:
            c = self.gradient - gradient  # about the mean, so that no large sums are subtracted
            hessian = torch.addcmul(self.hessian, c.unsqueeze(0), c.unsqueeze(1))  # + c cᵀ
            rise = torch.addcmul(self.laplacian_gradient, trace(hessian), c) + 2 * product(self.hessian, c)
            return (w * hessian).sum(2, keepdim=True), (w * rise).sum(1, keepdim=True)

        return Jet(largest + total.log(), gradient, higher)
