"""One solver for all objectives that are quadratic in the parameters of the drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REWEIGHTINGS = 200  # weighted ridge problems in a row at most
ROUNDS = 5  # of such rows; between them groups that left too early come back
SMOOTHING = 1e-5  # ε of √(|θ_g|² + ε²)
GONE = 1e-4  # norm below which a group leaves the problem
SELECTED = 0.02  # norm above which a group belongs to the drift that is fitted again
TOLERANCE = 1e-5  # largest change of a parameter in the last weighted ridge problem


@dataclass(frozen=True)
class Quadratic:
    """Function θᵀ H θ + 2 hᵀ θ + c of parameters θ, `[Q]`, such as those of a drift, flattened from `[d, P]`.

    Attributes:
        hessian: H, symmetric, `[Q, Q]`.
        linear: h, `[Q]`.
        constant: c, `[]`.
    """

    hessian: Tensor
    linear: Tensor
    constant: Tensor

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the value at θ, `[Q]`."""
        return theta @ (self.hessian @ theta) + 2 * self.linear @ theta + self.constant

    def slope(self, theta: Tensor) -> Tensor:
        """Return half the gradient at θ, `[Q]`."""
        return self.hessian @ theta + self.linear

    def restrict(self, kept: Tensor) -> Quadratic:
        """Return the function of some of the parameters, bool `[Q]`, the others zero."""
        return Quadratic(self.hessian[kept][:, kept], self.linear[kept], self.constant)


@dataclass(frozen=True)
class Term:
    """Objective of one environment, as a function of the drift with the intervention.

    Attributes:
        quadratic: of the parameters θ + δ.
        index: parameter that the intervention shifts: the constant of its target; None for observational data.
        size: δ, in the units of θ; None if it is to be fitted.
    """

    quadratic: Quadratic
    index: int | None
    size: float | None


@dataclass(frozen=True)
class Fit:
    """Result for one strength of the penalty.

    Attributes:
        fraction: λ over the least λ at which the drift has no edge.
        theta: minimum without penalty over the groups that the penalty left, `[Q]`.
        violation: largest violation of the optimality conditions, relative to λ.
    """

    fraction: float
    theta: Tensor
    violation: float


def combine(terms: Sequence[Term]) -> Quadratic:
    """Add environments to one function of θ and the unknown sizes, which come last, `[Q + U]`."""
    unknown = [term for term in terms if term.index is not None and term.size is None]
    count = len(terms[0].quadratic.linear)
    hessian = torch.zeros(count + len(unknown), count + len(unknown), dtype=torch.float64)
    linear, constant = hessian.new_zeros(len(hessian)), hessian.new_zeros(())
    for term in terms:
        own, index = term.quadratic, term.index
        hessian[:count, :count] += own.hessian
        linear[:count] += own.linear
        constant = constant + own.constant
        if index is None:
            continue
        if term.size is not None:
            linear[:count] += own.hessian[index] * term.size
            constant = constant + own.hessian[index, index] * term.size**2 + 2 * own.linear[index] * term.size
            continue
        place = count + next(k for k, other in enumerate(unknown) if other is term)
        hessian[place, :count] = hessian[:count, place] = own.hessian[index]
        hessian[place, place] = own.hessian[index, index]
        linear[place] = own.linear[index]
    return Quadratic(hessian, linear, constant)


def best_size(term: Term, theta: Tensor) -> float:
    """Return the size of an environment's shift that minimizes its objective for a given drift."""
    assert term.index is not None
    curvature = term.quadratic.hessian[term.index, term.index]
    return (-term.quadratic.slope(theta)[term.index] / curvature).item()


def fit_path(total: Quadratic, groups: Tensor, fractions: Sequence[float], ridge: float = 1e-6) -> list[Fit]:
    """Select groups by the group lasso for several λ, and fit them again without penalty, which would shrink them.

    The group lasso minimizes value + 2 λ Σ_g √(|θ_g|² + ε²), for each λ from the result of the next smaller one. A step
    solves the ridge problem that touches the objective from above at the current θ, by Cholesky factorization: every
    step lowers the objective, whatever the condition of H.

    Args:
        total: the function.
        groups: group of each parameter; -1 for those without penalty.
        fractions: λ over the least λ at which all groups vanish.
        ridge: added to the diagonal of H, relative to its mean.

    Returns:
        one result per fraction, in the order given.
    """
    hessian = total.hessian + ridge * total.hessian.diagonal().mean() * torch.eye(len(groups), dtype=torch.float64)
    total = Quadratic(hessian, total.linear, total.constant)
    free = groups < 0
    alone = torch.zeros_like(total.linear)
    alone[free] = -torch.linalg.solve(hessian[free][:, free], total.linear[free])
    largest = norms(total.slope(alone), groups).max().item()
    theta = -torch.cholesky_solve(total.linear[:, None], torch.linalg.cholesky(hessian))[:, 0]
    found = {}
    for fraction in sorted(fractions):
        theta = _minimize(total, groups, fraction * largest, theta)
        kept = (groups < 0) | (norms(theta, groups) > SELECTED)[groups.clamp_min(0)]
        again = torch.zeros_like(theta)
        again[kept] = -torch.linalg.solve(hessian[kept][:, kept], total.linear[kept])
        found[fraction] = Fit(fraction, again, violation(total, groups, fraction * largest, theta))
    return [found[fraction] for fraction in fractions]


def norms(theta: Tensor, groups: Tensor) -> Tensor:
    """Return |θ_g| of every group, `[G]`."""
    penalized = groups >= 0
    squares = theta.new_zeros(int(groups.max()) + 1)
    return squares.index_add(0, groups[penalized], theta[penalized].square()).sqrt()


def violation(total: Quadratic, groups: Tensor, penalty: float, theta: Tensor) -> float:
    """Return the largest violation of the conditions of a minimum of the group lasso, relative to λ.

    The slope of a group is -λ θ_g/|θ_g|, or at most λ in norm where θ_g = 0; that of parameters without penalty is 0.
    """
    slope, sizes = total.slope(theta), norms(theta, groups)
    free, zero = groups < 0, sizes < GONE
    inside = torch.where(zero, norms(slope, groups) - penalty, 0).max()
    unit = torch.where(free, 0, theta / sizes.clamp_min(SMOOTHING)[groups.clamp_min(0)])
    outside = torch.where(zero, 0, norms(slope + penalty * unit, groups)).max()
    return torch.stack([inside, outside, slope[free].abs().max()]).max().item() / penalty


def _minimize(total: Quadratic, groups: Tensor, penalty: float, theta: Tensor) -> Tensor:
    """Minimize for one λ. Groups with norm 0 stay out unless their slope shows that they belong to the minimum."""
    for _ in range(ROUNDS):
        theta = _reweight(total, groups, penalty, theta)
        slope = total.slope(theta)
        missing = (norms(theta, groups) == 0) & (norms(slope, groups) > 1.001 * penalty)
        if not missing.any():
            break
        back = (groups >= 0) & missing[groups.clamp_min(0)]
        theta = torch.where(back, -SELECTED * slope / norms(slope, groups)[groups.clamp_min(0)], theta)
    return theta


def _reweight(total: Quadratic, groups: Tensor, penalty: float, theta: Tensor) -> Tensor:
    """Solve weighted ridge problems until the parameters stay as they are; groups that vanish leave the problem."""
    free, of = groups < 0, groups.clamp_min(0)
    for _ in range(REWEIGHTINGS):
        sizes = norms(theta, groups)
        weights = torch.where(free, 0, (penalty / (sizes.square() + SMOOTHING**2).sqrt())[of])
        kept = free | (sizes >= GONE)[of]
        factor = torch.linalg.cholesky(total.hessian[kept][:, kept] + weights[kept].diag())
        before, theta = theta, torch.zeros_like(theta)
        theta[kept] = -torch.cholesky_solve(total.linear[kept][:, None], factor)[:, 0]
        if (theta - before).abs().max() < TOLERANCE:
            break
    return theta
