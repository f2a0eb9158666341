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
from bench.cases import CELEBA, CIFAR, GENES, MANY, SPRINGS, STEPS, TOY, Case
from bench.measuring import describe
from bench.peers import BACKENDS, PUBLISHED
from fluxmatching import Draws, flux_matching_loss

LOSS = "flux_matching_loss, forward and backward"
TOLERANCE = 1e-2  # "central" is a finite difference: it may be off by a thousandth
Step = Callable[[nn.Module, Tensor, Tensor | None, Draws], Tensor]


def make_field(case: Case) -> nn.Module:
    """A perceptron; of many groups a small one, which all share."""
    torch.manual_seed(0)
    width = 16 if case.groups > 1 else 256
    return nn.Sequential(nn.Linear(case.dimensions, width), nn.SiLU(), nn.Linear(width, case.dimensions))


def samples(case: Case, groups: int | None = None) -> tuple[Tensor, Tensor | None]:
    """(x, its centres if they are others) as the loss takes them: groups, the first ones only, behind the samples."""
    x, refs = (points[:groups].transpose(0, 1).squeeze(1).contiguous() for points in case.inputs())
    return x, None if case.queries == case.centres else refs


def exact(case: Case) -> bool:
    return case.dimensions == 2 and case.groups == 1


def ours(who: str, case: Case) -> Step:
    options: dict[str, Any] = {"divergence": "exact" if exact(case) else "hutchinson", "grouped": case.groups > 1}

    def step(field: nn.Module, x: Tensor, refs: Tensor | None, draws: Draws) -> Tensor:
        return flux_matching_loss(field, x, case.sigma2, refs=refs, draws=draws, backend=who, **options).mean()

    return step


def plain(case: Case) -> Step:
    """As published; the samples are the centres."""

    def step(field: nn.Module, x: Tensor, _: Tensor | None, draws: Draws) -> Tensor:
        start = torch.randn_like(x) if draws.start is None else draws.start

        def score(z: Tensor) -> Tensor:
            return published.kde_score(z, x, case.sigma2)

        x0 = x + math.sqrt(case.sigma2) * start
        return published.flux_loss(field, score, x0, case.sigma2, tau=draws.tau, noise=draws.chain).mean()

    return step


def gradient(step: Step, field: nn.Module, x: Tensor, refs: Tensor | None, draws: Draws) -> Tensor:
    found = torch.autograd.grad(step(field, x, refs, draws), list(field.parameters()))
    return torch.cat([part.flatten() for part in found])


def relative_error(step: Step, case: Case) -> float:
    """Of the gradient, against float64 with exact derivatives, the torch backend and the same draws.

    Of the first groups only.
    """
    (x, refs), generator = samples(case, 20), torch.Generator().manual_seed(1)
    draws = Draws(
        tau=torch.tensor(1.0),
        start=torch.randn(x.shape, generator=generator),
        chain=torch.randn(STEPS, *x.shape, generator=generator),
        probe=1.0 - 2.0 * torch.randint(2, x.shape, generator=generator),
    )
    parts = {name: value.double() for name, value in vars(draws).items() if value is not None}
    field = make_field(case)
    found = gradient(step, field, x, refs, draws)
    whole = None if refs is None else refs.double()
    truth = gradient(ours("torch", case), field.double(), x.double(), whole, Draws(**parts))
    return float((found.double() - truth).norm() / truth.norm())


CASES = (TOY, GENES[1], SPRINGS, CIFAR, CELEBA, MANY)
# As published the divergence is exact: D backward passes.
RUNS = [(case, who) for case in CASES for who in (*BACKENDS, *([PUBLISHED] if exact(case) else []))]


@pytest.mark.parametrize(("case", "who"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_loss(benchmark: Any, case: Case, who: str) -> None:
    step = plain(case) if who == PUBLISHED else ours(who, case)
    (x, refs), field = samples(case), make_field(case)
    benchmark.group = f"{LOSS}: {case.name}"
    benchmark.extra_info |= describe(LOSS, case, who, torch.float32)
    benchmark(gradient, step, field, x, refs, Draws())
    benchmark.extra_info["error"] = relative_error(step, case)
    assert benchmark.extra_info["error"] < TOLERANCE
