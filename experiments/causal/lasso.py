"""The lasso with a stored Hessian, by active sets: exact up to rounding, whatever the condition of H."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 2000  # at most
TOLERANCE = 1e-6  # of the conditions of a minimum, relative to λ


def lasso(hessian: Tensor, linear: Tensor, penalized: Tensor, penalty: float, theta: Tensor) -> Tensor:
    """Minimize θᵀ H θ + 2 hᵀ θ + 2 λ Σ |θ_j|.

    The parameters that are not zero, and those without penalty, are active. A step goes toward the minimum over the
    active parameters for fixed signs, as far as the objective falls: beyond the first change of sign, if need be. Once
    it is reached, parameters whose slope exceeds λ become active. Every step lowers the objective.

    Args:
        hessian: H, positive definite, `[Q, Q]`.
        linear: h, `[Q]`.
        penalized: which parameters have a penalty, bool `[Q]`.
        penalty: λ.
        theta: start, `[Q]`.

    Returns:
        the minimum, `[Q]`, with exact zeros.
    """
    for _ in range(STEPS):
        slope = hessian @ theta + linear
        signs = torch.where(penalized, theta.sign(), 0)
        active = ~penalized | (theta != 0)
        new = torch.zeros_like(active)
        if not ((slope + penalty * signs)[active].abs() > TOLERANCE * penalty).any():
            excess = torch.where(active, 0, slope.abs() - penalty)
            new = excess > TOLERANCE * penalty
            if not new.any():
                break
            signs = torch.where(new, -slope.sign(), signs)
        goal = _goal(hessian, linear, active, new, signs, penalty, slope)
        theta = _move(hessian, penalized, penalty, theta, goal)
    return theta


def solve(hessian: Tensor, linear: Tensor, kept: Tensor) -> Tensor:
    """Return the minimum of θᵀ H θ + 2 hᵀ θ over some of the parameters, bool `[Q]`, the others zero, `[Q]`."""
    index = kept.nonzero()[:, 0]
    factor = torch.linalg.cholesky(hessian[index][:, index])
    found = torch.zeros_like(linear)
    found[index] = -torch.cholesky_solve(linear[index][:, None], factor)[:, 0]
    return found


def _goal(
    hessian: Tensor, linear: Tensor, active: Tensor, new: Tensor, signs: Tensor, penalty: float, slope: Tensor
) -> Tensor:
    """Return the minimum for fixed signs, over the active parameters and those new ones that get their sign by it."""
    strongest = torch.zeros_like(new)
    strongest[torch.where(new, slope.abs(), -1).argmax()] = True
    while True:
        goal = solve(hessian, linear + penalty * signs * (active | new), active | new)
        wrong = new & (goal * signs <= 0)
        if not wrong.any() or torch.equal(new, strongest):
            return goal
        new = new & ~wrong if (new & ~wrong).any() else strongest


def _move(hessian: Tensor, penalized: Tensor, penalty: float, theta: Tensor, goal: Tensor) -> Tensor:
    """Return the minimum of the objective on the way from θ to the minimum for the signs of θ.

    With direction d = goal - θ and curvature q = dᵀ H d, half the derivative after the fraction t of the way is
    -q (1 - t) + 2 λ Σ |d_j| over the signs that have changed.
    """
    direction = goal - theta
    curvature = (direction @ (hessian @ direction)).item()
    crossing = (penalized & (theta != 0) & (goal * theta <= 0)).nonzero()[:, 0]
    times, order = (-theta[crossing] / direction[crossing]).sort()
    crossing, change, reached = crossing[order], 0.0, 0.0
    for j, t in zip(crossing.tolist(), times.tolist(), strict=True):
        if change > curvature * (1 - t):
            break
        change += 2 * penalty * abs(direction[j].item())
        if change >= curvature * (1 - t):
            found = theta + t * direction
            found[j] = 0
            return found
        reached = t
    return theta + max(reached, 1 - change / curvature if curvature > 0 else 1.0) * direction
