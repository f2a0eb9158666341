"""The flux loss of one minibatch with its gradient in a small network's weights; whole training steps: bench/training.

The peer has the paper's formulas and autograd throughout, with an exact divergence, and so have we beside it.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import published
from bench.cases import CIFAR, SPRINGS, STEPS, TOY, Case
from bench.measuring import describe
from bench.peers import BACKENDS, PUBLISHED
from fluxmatching import Draws, flux_matching_loss

LOSS = "flux_matching_loss, forward and backward"
TOLERANCE = 1e-2  # "central" is a finite difference: it may be off by a thousandth
Step = Callable[[nn.Module, Tensor, float, Draws], Tensor]


def make_field(dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(dimensions, 256), nn.SiLU(), nn.Linear(256, dimensions))


def ours(who: str, dimensions: int) -> Step:
    divergence = "exact" if dimensions == 2 else "hutchinson"

    def step(field: nn.Module, x: Tensor, sigma2: float, draws: Draws) -> Tensor:
        return flux_matching_loss(field, x, sigma2, divergence=divergence, draws=draws, backend=who).mean()

    return step


def plain(field: nn.Module, x: Tensor, sigma2: float, draws: Draws) -> Tensor:
    start = torch.randn_like(x) if draws.start is None else draws.start

    def score(z: Tensor) -> Tensor:
        return published.kde_score(z, x, sigma2)

    return published.flux_loss(
        field, score, x + math.sqrt(sigma2) * start, sigma2, tau=draws.tau, noise=draws.chain
    ).mean()


def gradient(step: Step, field: nn.Module, x: Tensor, sigma2: float, draws: Draws) -> Tensor:
    found = torch.autograd.grad(step(field, x, sigma2, draws), list(field.parameters()))
    return torch.cat([part.flatten() for part in found])


def relative_error(step: Step, case: Case) -> float:
    """Of the gradient, against float64 with exact derivatives, the torch backend and the same draws."""
    (x, _), generator = case.inputs(), torch.Generator().manual_seed(1)
    x = x[0]
    draws = Draws(
        tau=torch.tensor(1.0),
        start=torch.randn(x.shape, generator=generator),
        chain=torch.randn(STEPS, *x.shape, generator=generator),
        probe=1.0 - 2.0 * torch.randint(2, x.shape, generator=generator),
    )
    parts = {name: value.double() for name, value in vars(draws).items() if value is not None}
    field = make_field(case.dimensions)
    found = gradient(step, field, x, case.sigma2, draws)
    truth = gradient(ours("torch", case.dimensions), field.double(), x.double(), case.sigma2, Draws(**parts))
    return float((found.double() - truth).norm() / truth.norm())


RUNS = [(case, who) for case in (TOY, SPRINGS, CIFAR) for who in (*BACKENDS, *([PUBLISHED] if case is TOY else []))]


@pytest.mark.parametrize(("case", "who"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_loss(benchmark: Any, case: Case, who: str) -> None:
    step = plain if who == PUBLISHED else ours(who, case.dimensions)
    (x, _), field = case.inputs(), make_field(case.dimensions)
    benchmark.group = f"{LOSS}: {case.name}"
    benchmark.extra_info |= describe(LOSS, case, who, torch.float32)
    benchmark(gradient, step, field, x[0], case.sigma2, Draws())
    benchmark.extra_info["error"] = relative_error(step, case)
    assert benchmark.extra_info["error"] < TOLERANCE
