"""Objectives that are quadratic in the parameters of the drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Quadratic(Protocol):
    """Function θᵀ H θ + 2 hᵀ θ + c of parameters θ, `[Q]`, with H symmetric, whose Q² entries need not be stored.

    Attributes:
        linear: h, `[Q]`.
        constant: c, `[]`.
    """

    @property
    def linear(self) -> Tensor: ...

    @property
    def constant(self) -> Tensor: ...

    def slope(self, theta: Tensor) -> Tensor:
        """Return half the gradient at θ, `[Q]`."""

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries of H in some rows and columns, given by their indices, `[R]` and `[C]`."""


@dataclass(frozen=True)
class Dense:
    """Quadratic function with all entries of H stored.

    Attributes:
        hessian: H, `[Q, Q]`.
        linear, constant: as in `Quadratic`.
    """

    hessian: Tensor
    linear: Tensor
    constant: Tensor

    def slope(self, theta: Tensor) -> Tensor:
        """Return half the gradient at θ, `[Q]`."""
        return self.hessian @ theta + self.linear

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of H, `[R, C]`."""
        return self.hessian[rows][:, columns]

    def restrict(self, kept: Tensor) -> Dense:
        """Return the function of some of the parameters, bool `[Q]`, the others zero."""
        return Dense(self.hessian[kept][:, kept], self.linear[kept], self.constant)


def value(function: Quadratic, theta: Tensor) -> Tensor:
    """Return the value at θ, `[Q]`."""
    return theta @ (function.slope(theta) + function.linear) + function.constant
