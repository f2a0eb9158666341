"""One solver for all objectives: the lasso over several λ, with entries of H in a working set of parameters only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.causal.lasso import lasso, solve
from experiments.causal.quadratic import Quadratic

SELECTED = 0.02  # size above which a parameter belongs to the drift that is fitted again
RIDGE = 1e-6  # added to the diagonal of H, relative to its mean over parameters without penalty
WHOLE = 500  # number of parameters up to which all are in the working set at once
SLACK = 1e-3  # by how much, relative to λ, a slope outside the working set may exceed λ
AHEAD = 0.4  # where the working set grows, parameters whose slope exceeds this times λ join it


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

    def slope(self, theta: Tensor, size: float | None) -> Tensor:
        """Return half the gradient in θ, `[Q]`, for a size that is fitted."""
        size = self.size if size is None else size
        if self.index is None or size is None:
            return self.quadratic.slope(theta)
        shifted = theta.clone()
        shifted[self.index] += size
        return self.quadratic.slope(shifted)


@dataclass(frozen=True)
class Fit:
    """Result for one strength of the penalty.

    Attributes:
        fraction: λ over the least λ at which the drift has no edge.
        theta: minimum without penalty over the parameters that the penalty left, `[Q]`.
        violation: largest violation of the optimality conditions, relative to λ.
    """

    fraction: float
    theta: Tensor
    violation: float


def best_size(term: Term, theta: Tensor) -> float:
    """Return the size of an environment's shift that minimizes its objective for a given drift."""
    assert term.index is not None
    index = torch.tensor([term.index])
    curvature = term.quadratic.block(index, index)[0, 0]
    return (-term.quadratic.slope(theta)[term.index] / curvature).item()


@dataclass
class Problem:
    """Sum of the objectives of environments, in parts of which one can be left out.

    Attributes:
        parts: the environments.
        penalized: which parameters have a penalty, bool `[Q]`.
        working: indices of the parameters in the working set; all others are zero, `[W]`.
        hessians: sum of H over each part, of the working set, `[W, W]`.
        columns: of each environment with an intervention, the column of H that belongs to its shift, `[W]`.
        ridge: added to the diagonal of H.
    """

    parts: list[list[Term]]
    penalized: Tensor
    working: Tensor
    hessians: list[Tensor]
    columns: dict[int, Tensor]
    ridge: float = 0.0

    @classmethod
    def of(cls, parts: list[list[Term]], penalized: Tensor) -> Problem:
        """Make a problem whose working set are the parameters without penalty, or all if they are few."""
        empty = torch.zeros(0, dtype=torch.long)
        problem = cls(parts, penalized, empty, [torch.zeros(0, 0, dtype=torch.float64) for _ in parts], {})
        problem.extend(~penalized if len(penalized) > WHOLE else torch.ones_like(penalized))
        free = ~penalized[problem.working]
        problem.ridge = RIDGE * sum(hessian.diagonal()[free].mean().item() for hessian in problem.hessians)
        return problem

    def extend(self, new: Tensor) -> None:
        """Add parameters, bool `[Q]`, to the working set."""
        added, before = new.nonzero()[:, 0], len(self.working)
        self.working = torch.cat([self.working, added])
        place = {index: k for k, index in enumerate(self.working.tolist())}
        for k, part in enumerate(self.parts):
            hessian = torch.zeros(len(self.working), len(self.working), dtype=torch.float64)
            hessian[:before, :before] = self.hessians[k]
            for term in part:
                rows = term.quadratic.block(added, self.working)
                rows[:, before:] = 0.5 * (rows[:, before:] + rows[:, before:].T)
                hessian[before:] += rows
                if term.index is not None:
                    earlier = self.columns.get(id(term), hessian[0, :0])
                    self.columns[id(term)] = torch.cat([earlier, rows[:, place[term.index]]])
            hessian[:before, before:] = hessian[before:, :before].T
            self.hessians[k] = hessian

    def assemble(self, used: list[int]) -> tuple[Tensor, Tensor]:
        """Return H and h of the sum over some parts, of the working set and the unknown sizes, which come last."""
        terms = [term for k in used for term in self.parts[k]]
        unknown = [term for term in terms if term.index is not None and term.size is None]
        count = len(self.working)
        hessian = torch.zeros(count + len(unknown), count + len(unknown), dtype=torch.float64)
        linear = hessian.new_zeros(len(hessian))
        for k in used:
            hessian[:count, :count] += self.hessians[k]
        for term in terms:
            linear[:count] += term.quadratic.linear[self.working]
            if term.index is not None and term.size is not None:
                linear[:count] += term.size * self.columns[id(term)]
        for place, term in enumerate(unknown, count):
            column, at = self.columns[id(term)], self.working == term.index
            hessian[place, :count] = hessian[:count, place] = column
            hessian[place, place] = column[at]
            linear[place] = term.quadratic.linear[term.index]
        return hessian + self.ridge * torch.eye(len(hessian), dtype=torch.float64), linear

    def slope(self, theta: Tensor, sizes: Tensor, used: list[int]) -> Tensor:
        """Return half the gradient of the sum over some parts at θ, `[Q]`, and unknown sizes, `[U]`."""
        left, total = iter(sizes.tolist()), self.ridge * theta
        for k in used:
            for term in self.parts[k]:
                fitted = term.index is not None and term.size is None
                total = total + term.slope(theta, next(left) if fitted else None)
        return total

    def path(self, fractions: Sequence[float], left_out: int | None = None) -> Iterator[Fit]:
        """Choose edges by the lasso for one λ after the other, and fit them again without penalty.

        For each λ the working set grows until no slope outside it exceeds λ. Paths of one problem share it, and may
        take turns.

        Args:
            fractions: λ over the least λ at which all edges vanish; quickest if they fall.
            left_out: part that does not count.
        """
        used = [k for k in range(len(self.parts)) if k != left_out]
        hessian, linear = self.assemble(used)
        found = solve(hessian, linear, ~self._penalized(linear))
        theta, sizes = self._split(found)
        largest = self._slope(found, hessian, linear, used)[self.penalized].abs().max().item()
        for fraction in fractions:
            penalty = fraction * largest
            while True:
                hessian, linear = self.assemble(used)
                start = torch.cat([theta[self.working], sizes])
                found = lasso(hessian, linear, self._penalized(linear), penalty, start)
                theta, sizes = self._split(found)
                slope = self._slope(found, hessian, linear, used)
                outside = slope.abs()
                outside[self.working] = 0
                if not (outside > (1 + SLACK) * penalty).any():
                    break
                self.extend(outside > AHEAD * penalty)
            again = solve(hessian, linear, ~self._penalized(linear) | (found.abs() > SELECTED))
            yield Fit(fraction, self._split(again)[0], violation(slope, theta, self.penalized, penalty))

    def _slope(self, found: Tensor, hessian: Tensor, linear: Tensor, used: list[int]) -> Tensor:
        """Return half the gradient, `[Q]`, by the stored H and h if they have all parameters."""
        if len(self.working) == len(self.penalized):
            return self._split(hessian @ found + linear)[0]
        return self.slope(*self._split(found), used)

    def _penalized(self, linear: Tensor) -> Tensor:
        """Return which parameters of the working set have a penalty, and that unknown sizes have none, `[W + U]`."""
        penalized = self.penalized[self.working]
        return torch.cat([penalized, penalized.new_zeros(len(linear) - len(penalized))])

    def _split(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ `[Q]` and the unknown sizes `[U]` for parameters of the working set and sizes, `[W + U]`."""
        theta = found.new_zeros(len(self.penalized))
        theta[self.working] = found[: len(self.working)]
        return theta, found[len(self.working) :]


def violation(slope: Tensor, theta: Tensor, penalized: Tensor, penalty: float) -> float:
    """Return the largest violation of the conditions of a minimum of the lasso, relative to λ.

    The slope is -λ times the sign of a parameter, or at most λ in size where it is zero; without penalty it is 0.
    """
    wanted = torch.where(penalized, -penalty * theta.sign(), 0)
    excess = torch.where(penalized & (theta == 0), slope.abs() - penalty, (slope - wanted).abs())
    return max(excess.max().item(), 0) / penalty
