"""The controllable experiment's unit of work at paper settings: the flux loss of one field, 64 minibatches of 256.

The baseline computes it as published: minibatch by minibatch, with gradients of the templates and of r by autograd. Its
fields get their gradients from autograd too, as in published code.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines import BACKENDS, PUBLISHED
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.rotation import quarter_turn
from experiments.controllable.fields import Controls, Family, SkewTemplate, TriangleTemplate
from experiments.controllable.metrics import flux_losses
from tests.support import published

THETA = torch.tensor([2.5, -2.5, 2.5], dtype=torch.float64)
MINIBATCHES, BATCH = 64, 256


def make_controls() -> Controls:
    mixture = GaussianMixture(triangle_means(2.3), 0.625)
    controls = Controls(mixture, TriangleTemplate(mixture.means), SkewTemplate(2.3))
    controls.normalize(mixture.sample(1200, torch.Generator().manual_seed(0)))
    return controls


def field_by_autograd(controls: Controls, family: Family) -> Callable[[Tensor], Tensor]:
    """The field of Eq. 18 or Eq. 30, with ∇ψ from autograd."""
    signs = (-1, 1) if family == "preserving" else (1, 1)

    def turn(v: Tensor) -> Tensor:
        return quarter_turn(v) if family == "preserving" else v

    def field(x: Tensor) -> Tensor:
        score = controls.mixture.score(x)
        columns = [turn(score)]
        for sign, template in zip(signs, (controls.triangle, controls.skew), strict=True):
            psi = template.log_and_grad(x)[0].exp()
            (gradient,) = torch.autograd.grad(psi.sum(), x, create_graph=True)
            columns.append(sign * turn(gradient) / controls.mixture.log_density(x).exp().unsqueeze(-1))
        return score + (THETA.unsqueeze(-1) * controls.scales.unsqueeze(-1) * torch.stack(columns, -2)).sum(-2)

    return field


def published_losses(controls: Controls, family: Family = "preserving") -> Tensor:
    """The loss of each minibatch, `[MINIBATCHES]`."""
    field = field_by_autograd(controls, family)
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [
            published.flux_loss(field, controls.mixture.score, controls.mixture.sample(BATCH, generator), 0.625).mean()
            for _ in range(MINIBATCHES)
        ]
    )


@pytest.mark.parametrize("implementation", [*BACKENDS, PUBLISHED])
def test_speed(benchmark: Any, implementation: str) -> None:
    controls = make_controls()
    benchmark.group = f"controllable: one field, {MINIBATCHES} minibatches of {BATCH}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if implementation == PUBLISHED:
        benchmark.pedantic(published_losses, (controls,), rounds=3, warmup_rounds=1)
    else:
        generator = torch.Generator().manual_seed(1)
        arguments = (controls, THETA, "preserving", BATCH, MINIBATCHES, generator, implementation)
        benchmark.pedantic(flux_losses, arguments, rounds=5, warmup_rounds=1)
