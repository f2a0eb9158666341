"""Langevin chains with cycles of step sizes: evaluations per independent draw, and bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.augment.problems import MixtureProblem
from experiments.common.autocorrelation import integrated_autocorrelation_time
from experiments.common.mixture import GaussianMixture

Field = Callable[[Tensor], Tensor]
CONSTANT, CYCLIC, CHEBYSHEV = "constant", "cyclic", "Chebyshev"
KINDS = (CONSTANT, CYCLIC, CHEBYSHEV)


@dataclass(frozen=True)
class Schedule:
    """A cycle of step sizes. The state after its last step, the smallest, counts as a draw.

    Attributes:
        kind: one of `KINDS`.
        sizes: step sizes of one cycle, in the unit of the problem.
    """

    kind: str
    sizes: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of steps of a cycle."""
        return len(self.sizes)


@dataclass(frozen=True)
class Cost:
    """Evaluations of the field per independent draw of chains with a schedule, and their bias."""

    evaluations: float
    bias: float


def cyclic(largest: float, smallest: float, steps: int) -> Schedule:
    """Return step sizes that fall by equal factors."""
    return Schedule(CYCLIC, tuple(largest * (smallest / largest) ** (k / (steps - 1)) for k in range(steps)))


def chebyshev(smallest: float, ratio: float, steps: int) -> Schedule:
    """Return inverse Chebyshev nodes of an interval whose ends have that ratio, scaled to end at `smallest`.

    On a Gaussian whose precisions fill that interval they are the steps that contract the mean the most.
    """
    nodes = [
        (1 + 1 / ratio) / 2 + (1 - 1 / ratio) / 2 * math.cos(math.pi * (2 * k + 1) / (2 * steps)) for k in range(steps)
    ]
    return Schedule(CHEBYSHEV, tuple(smallest * nodes[0] / node for node in reversed(nodes)))


def mixture_schedules() -> list[Schedule]:
    """Return the schedules that are tried on a mixture, the same for every field."""
    constant = [Schedule(CONSTANT, (h,)) for h in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3)]
    falling = [
        cyclic(largest, smallest, steps)
        for steps in (4, 8)
        for largest in (0.5, 1.0, 1.4, 1.8)
        for smallest in (0.05, 0.1, 0.2)
    ]
    nodes = [
        chebyshev(smallest, ratio, steps) for steps in (4, 8) for ratio in (8.0, 20.0) for smallest in (0.1, 0.15, 0.2)
    ]
    return [*constant, *falling, *nodes]


def gaussian_schedules() -> list[Schedule]:
    """Return the schedules that are tried on a Gaussian, the same for every field."""
    scales = [0.02 * 1.3**k for k in range(18)]
    lengths = (4, 8, 16, 32, 64)
    constant = [Schedule(CONSTANT, (h,)) for h in scales]
    falling = [cyclic(ratio * h, h, steps) for steps in lengths for ratio in (4, 10, 25, 60, 150) for h in scales]
    nodes = [chebyshev(h, ratio, steps) for steps in lengths for ratio in (10, 30, 100) for h in scales]
    return [*constant, *falling, *nodes]


def measure_mixture(
    field: Field,
    problem: MixtureProblem,
    schedules: list[Schedule],
    evaluations: int,
    chains: int,
    seed: int,
    within: tuple[GaussianMixture, Tensor] | None = None,
) -> dict[Schedule, Cost]:
    """Run chains from exact samples with every schedule; one that diverges, or whose chains are too short, is left out.

    The number of states per draw is 1 + 2 Σ ρ of the coordinate with the longest memory, and at least 1: successive
    states of a rotating chain may have negative correlations, which help means of coordinates and nothing else.

    Args:
        field: f(x), x `[n, D]`.
        problem: the stationary distribution.
        schedules: cycles of step sizes.
        evaluations: length of each chain.
        chains: number of chains per schedule.
        seed: of starts and noise, which all fields share.
        within: a mixture in more dimensions E, in which the chains run, and an orthonormal basis `[E, D]` of the space
            of the problem there; None for chains in the space itself.
    """
    mixture, basis = (problem.mixture, None) if within is None else within
    found: dict[Schedule, Cost] = {}
    for steps in sorted({schedule.steps for schedule in schedules}):
        some = [schedule for schedule in schedules if schedule.steps == steps]
        states = run_chains(field, mixture, some, evaluations // steps, chains, seed)
        for schedule, path in zip(some, states.unbind(1), strict=True):
            cost = cost_of(path if basis is None else path @ basis, problem, steps)
            if cost is not None:
                found[schedule] = cost
    return found


def run_chains(
    field: Field, mixture: GaussianMixture, schedules: list[Schedule], cycles: int, chains: int, seed: int
) -> Tensor:
    """Run chains of schedules with equally many steps; returns the state after each cycle, `[cycles, S, chains, D]`."""
    generator = torch.Generator().manual_seed(seed)
    x = mixture.sample(len(schedules) * chains, generator)
    sizes = mixture.variance * torch.tensor([schedule.sizes for schedule in schedules]).repeat_interleave(chains, 0)
    drifts, noises = sizes.T.unsqueeze(-1), (2 * sizes).sqrt().T.unsqueeze(-1)
    path = []
    with torch.no_grad():
        for _ in range(cycles):
            for drift, noise in zip(drifts, noises, strict=True):
                x = x + drift * field(x) + noise * torch.randn(x.shape, generator=generator)
            path.append(x)
    return torch.stack(path).unflatten(1, (len(schedules), chains))


def cost_of(path: Tensor, problem: MixtureProblem, steps: int) -> Cost | None:
    """Return the cost of chains `[cycles, chains, D]`, or None if they diverge or are too short."""
    try:
        times = [integrated_autocorrelation_time(values) for values in path.unbind(-1)]
    except ValueError:
        return None
    return Cost(steps * max(1.0, *times), problem.bias(path[len(path) // 10 :]))


def measure_gaussian(matrix: Tensor, variances: Tensor, schedules: list[Schedule]) -> dict[Schedule, Cost]:
    """Compute the cost of chains of a linear field f = Bx on a Gaussian in closed form, without unstable schedules.

    A cycle is x ← P x + noise of covariance Q. Its stationary covariance solves V = P V Pᵀ + Q. The number of states
    per draw is that of the linear function with the longest memory, the largest eigenvalue of
    V^-½ (V + (1 - P)⁻¹ P V + its transpose) V^-½, and at least 1. The bias is |Σ^-½ V Σ^-½ - 1|/√D.

    Args:
        matrix: B, `[D, D]`, float64.
        variances: diagonal of Σ, `[D]`, float64. The unit of step sizes is the smallest.
        schedules: cycles of step sizes.
    """
    unit, eye = variances.min().item(), torch.eye(len(variances), dtype=torch.float64)
    found: dict[Schedule, Cost] = {}
    for schedule in schedules:
        product, noise = eye, torch.zeros_like(eye)
        for size in schedule.sizes:
            step = eye + unit * size * matrix
            product, noise = step @ product, step @ noise @ step.T + 2 * unit * size * eye
        if not product.isfinite().all() or torch.linalg.eigvals(product).abs().max() >= 1:
            continue
        covariance = stationary_covariance(product, noise)
        memory = torch.linalg.solve(eye - product, product @ covariance)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:  # rounding, at the edge of stability
            continue
        root = torch.linalg.inv(factor)
        times = torch.linalg.eigvalsh(eye + root @ (memory + memory.T) @ root.T)
        scale = variances.rsqrt()
        error = scale[:, None] * covariance * scale - eye
        found[schedule] = Cost(schedule.steps * max(1.0, times.max().item()), error.norm().item() / math.sqrt(len(eye)))
    return found


def stationary_covariance(product: Tensor, noise: Tensor) -> Tensor:
    """Solve V = P V Pᵀ + Q for a matrix P of spectral radius below 1, by doubling the number of steps."""
    covariance = noise
    while product.abs().max() > 1e-12:
        covariance = covariance + product @ covariance @ product.T
        product = product @ product
    return (covariance + covariance.T) / 2


def best(costs: dict[Schedule, Cost]) -> dict[Schedule, Cost]:
    """Return, of every kind of schedule, those that no other of the kind beats in evaluations and bias."""
    found: dict[Schedule, Cost] = {}
    for kind in KINDS:
        least = math.inf
        some = [(cost.bias, cost.evaluations, schedule) for schedule, cost in costs.items() if schedule.kind == kind]
        for _, evaluations, schedule in sorted(some, key=lambda entry: entry[:2]):
            if evaluations < least:
                least = evaluations
                found[schedule] = costs[schedule]
    return found
