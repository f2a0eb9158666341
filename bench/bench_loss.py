"""The flux loss of one minibatch with its gradient in a small network's weights; whole training steps: bench/training.

The baseline has the paper's formulas and autograd throughout, with an exact divergence; ours has one too beside it.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.baselines import BACKENDS, PUBLISHED
from bench.measuring import describe
from bench.workloads import CELEBA, CIFAR, GENES, MANY, SPRINGS, TOY, Workload
from fluxmatching import Draws, FluxOptions, UniformHorizon, flux_matching_loss
from tests.support import published
from tests.support.ops import NUM_STEPS

LOSS = "flux_matching_loss, forward and backward"
TOLERANCE = 1e-2  # of a finite difference, which may be off by a thousandth
Step = Callable[[nn.Module, Tensor, Tensor | None, Draws], Tensor]


def make_field(workload: Workload) -> nn.Module:
    """A perceptron; for many groups a small one, which all share."""
    torch.manual_seed(0)
    width = 16 if workload.groups > 1 else 256
    return nn.Sequential(nn.Linear(workload.dimensions, width), nn.SiLU(), nn.Linear(width, workload.dimensions))


def samples(workload: Workload, groups: int | None = None) -> tuple[Tensor, Tensor | None]:
    """(x, its reference points if they are others) as the loss takes them, of the first groups only."""
    x, refs = (points[:groups].transpose(0, 1).squeeze(1).contiguous() for points in workload.inputs())
    return x, None if workload.queries == workload.refs else refs


def exact(workload: Workload) -> bool:
    return workload.dimensions == 2 and workload.groups == 1


def ours(backend: str, workload: Workload) -> Step:
    divergence = "exact" if exact(workload) else "hutchinson"
    options = FluxOptions(horizon=UniformHorizon(), divergence=divergence, grouped=workload.groups > 1, backend=backend)
    sigma = math.sqrt(workload.sigma2)

    def step(field: nn.Module, x: Tensor, refs: Tensor | None, draws: Draws) -> Tensor:
        return flux_matching_loss(field, x, sigma, options, refs=refs, draws=draws).mean()

    return step


def plain(workload: Workload) -> Step:
    """The loss as published; the samples are the reference points."""

    def step(field: nn.Module, x: Tensor, _: Tensor | None, draws: Draws) -> Tensor:
        start = torch.randn_like(x) if draws.start is None else draws.start

        def score(z: Tensor) -> Tensor:
            return published.kde_score(z, x, workload.sigma2)

        x0 = x + math.sqrt(workload.sigma2) * start
        return published.flux_loss(field, score, x0, workload.sigma2, tau=draws.tau, noise=draws.chain).mean()

    return step


def gradient(step: Step, field: nn.Module, x: Tensor, refs: Tensor | None, draws: Draws) -> Tensor:
    found = torch.autograd.grad(step(field, x, refs, draws), list(field.parameters()))
    return torch.cat([part.flatten() for part in found])


def relative_error(step: Step, workload: Workload) -> float:
    """Error of the gradient, against float64 with exact derivatives, the torch backend and the same draws.

    On the first groups only.
    """
    (x, refs), generator = samples(workload, 20), torch.Generator().manual_seed(1)
    draws = Draws(
        tau=torch.tensor(1.0),
        start=torch.randn(x.shape, generator=generator),
        chain=torch.randn(NUM_STEPS, *x.shape, generator=generator),
        probe=1.0 - 2.0 * torch.randint(2, x.shape, generator=generator),
    )
    parts = {name: value.double() for name, value in vars(draws).items() if value is not None}
    field = make_field(workload)
    found = gradient(step, field, x, refs, draws)
    whole = None if refs is None else refs.double()
    truth = gradient(ours("torch", workload), field.double(), x.double(), whole, Draws(**parts))
    return float((found.double() - truth).norm() / truth.norm())


WORKLOADS = (TOY, GENES[1], SPRINGS, CIFAR, CELEBA, MANY)
# As published the divergence is exact: D backward passes.
RUNS = [
    (workload, implementation)
    for workload in WORKLOADS
    for implementation in (*BACKENDS, *([PUBLISHED] if exact(workload) else []))
]


@pytest.mark.parametrize(("workload", "implementation"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_loss(benchmark: Any, workload: Workload, implementation: str) -> None:
    step = plain(workload) if implementation == PUBLISHED else ours(implementation, workload)
    (x, refs), field = samples(workload), make_field(workload)
    benchmark.group = f"{LOSS}: {workload.name}"
    benchmark.extra_info |= describe(LOSS, workload, implementation, torch.float32)
    benchmark(gradient, step, field, x, refs, Draws())
    benchmark.extra_info["error"] = relative_error(step, workload)
    assert benchmark.extra_info["error"] < TOLERANCE
