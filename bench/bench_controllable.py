"""The controllable experiment's unit of work at paper settings: the flux loss of one field, 64 minibatches of 256.

The peer does it as published: minibatch by minibatch, gradients of the templates and of r by autograd throughout.
Its fields get their gradients from autograd too, which is what makes a minibatch cost what it costs there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fluxkernels as fk
from bench import published
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.controllable.fields import Controls, SkewTemplate, TriangleTemplate, rotate
from experiments.controllable.metrics import flux_losses

BACKENDS = [name for name, backend in fk.backends().items() if backend.available]
THETA = torch.tensor([2.5, -2.5, 2.5], dtype=torch.float64)
MINIBATCHES, BATCH = 64, 256


def make_controls() -> Controls:
    mixture = GaussianMixture(triangle_means(2.3), 0.625)
    controls = Controls(mixture, TriangleTemplate(mixture.means), SkewTemplate(2.3))
    controls.normalise(mixture.sample(1200, torch.Generator().manual_seed(0)))
    return controls


def field_by_autograd(controls: Controls) -> Callable[[Tensor], Tensor]:
    """The preserving field of Eq. 18, ∇ψ taken by autograd."""
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def field(x: Tensor) -> Tensor:
        score = controls.mixture.score(x)
        columns = [rotate(score)]
        for sign, template in zip(signs, (controls.triangle, controls.skew), strict=True):
            psi = template.log_and_grad(x)[0].exp()
            (gradient,) = torch.autograd.grad(psi.sum(), x, create_graph=True)
            columns.append(sign * rotate(gradient) / controls.mixture.log_density(x).exp().unsqueeze(-1))
        return score + (THETA.unsqueeze(-1) * controls.scales.unsqueeze(-1) * torch.stack(columns, -2)).sum(-2)

    return field


def published_losses(controls: Controls) -> Tensor:
    field = field_by_autograd(controls)
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [
            published.flux_loss(field, controls.mixture.score, controls.mixture.sample(BATCH, generator), 0.625).mean()
            for _ in range(MINIBATCHES)
        ]
    )


def test_both_compute_the_same_loss() -> None:
    """A comparison of speeds needs equal answers: zero for a preserving field, to rounding, from both."""
    controls = make_controls()
    ours = flux_losses(controls, THETA, "preserving", BATCH, 4, torch.Generator().manual_seed(1), "torch")
    violating = flux_losses(controls, THETA, "violating", BATCH, 4, torch.Generator().manual_seed(1), "torch")
    assert ours.abs().max() < 1e-8 * violating.abs().mean()
    assert published_losses(controls).abs().max() < 1e-6 * violating.abs().mean()


@pytest.mark.parametrize("who", [*BACKENDS, "published"])
def test_speed(benchmark: Any, who: str) -> None:
    controls = make_controls()
    benchmark.group = f"controllable: one field, {MINIBATCHES} minibatches of {BATCH}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if who == "published":
        benchmark.pedantic(published_losses, (controls,), rounds=3, warmup_rounds=1)
    else:
        generator = torch.Generator().manual_seed(1)
        arguments = (controls, THETA, "preserving", BATCH, MINIBATCHES, generator, who)
        benchmark.pedantic(flux_losses, arguments, rounds=5, warmup_rounds=1)
