"""Checks of the derivatives of architectures: the exact score, measurements against it, networks, and a whole run."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.architectures import EXPERIMENT
from experiments.architectures.derivatives import (
    divergence_gradient,
    first_derivatives,
    jacobian,
    seam_pairs,
    second_derivatives,
    signs,
)
from experiments.architectures.experiment import main
from experiments.architectures.networks import ARCHITECTURES, PATCH_1, PATCH_2, PATCH_4, PATCH_4_CONV, ROWS, UNET
from experiments.architectures.precision import attempt, column
from experiments.architectures.problem import PIXELS, ExactScore, covariance, draw_images, spread, waves
from experiments.architectures.quality import compare, excess, noisy
from experiments.architectures.results import UNTRAINED
from experiments.architectures.training import OBJECTIVES, make_field, make_trainer
from experiments.common.run import Run
from fluxmatching.losses.second_derivatives import ClosedForm, endpoint_gradient


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def log_density(x: Tensor, sigma: float) -> Tensor:
    """log p_σ up to a constant by torch.distributions, x `[n, 64]`."""
    law = torch.distributions.MultivariateNormal(waves(), covariance() + sigma**2 * torch.eye(PIXELS).double())
    return law.log_prob(x.unsqueeze(1)).logsumexp(1)


class Turned:
    """A field that is not the score and has its law: s + A s with A antisymmetric leaves p in place, as s·As = 0."""

    def __init__(self, exact: ExactScore, strength: float) -> None:
        a = torch.randn(PIXELS, PIXELS, generator=generator(5)).double() / 8
        self.exact, self.matrix = exact, strength * (a - a.T)

    def __call__(self, z: Tensor) -> Tensor:
        score = self.exact(z)
        return score + (score.flatten(1) @ self.matrix.T).reshape(z.shape)


# ---------------------------------------------------------------- the exact score


@pytest.mark.parametrize("sigma", [0.2, 2.0])
def test_score_and_jacobian_are_derivatives_of_the_density(sigma: float) -> None:
    exact = ExactScore(sigma)
    z = (
        draw_images(3, generator()) + sigma * torch.randn(3, 1, 8, 8, generator=generator(1)).double()
    ).requires_grad_()
    (score,) = torch.autograd.grad(log_density(z.flatten(1), sigma).sum(), z)
    torch.testing.assert_close(exact(z), score)
    hessian = torch.stack(
        [torch.func.hessian(lambda x: log_density(x[None], sigma)[0])(x) for x in z.detach().flatten(1)]
    )
    torch.testing.assert_close(exact.jacobian(z.detach()), hessian)


def test_second_derivatives_of_the_score_are_those_of_autograd() -> None:
    exact = ExactScore(1.0)
    assert isinstance(exact, ClosedForm)
    z, score = noisy_points(4, 1.0), torch.randn(4, 1, 8, 8, generator=generator(2)).double()
    for probe in (None, signs(z, generator(3))):
        for found, true in zip(
            exact.endpoint_gradient(z, score, probe),
            endpoint_gradient(exact, z, score, probe, method="double_backward"),
            strict=True,
        ):
            torch.testing.assert_close(found, true)


def noisy_points(count: int, sigma: float) -> Tensor:
    return draw_images(count, generator()) + sigma * torch.randn(count, 1, 8, 8, generator=generator(1)).double()


def test_drawn_images_have_the_moments_of_the_law() -> None:
    x = draw_images(40_000, generator()).flatten(1)
    torch.testing.assert_close(x.T.cov(), covariance() + waves().T @ waves() / 4, atol=0.06, rtol=0)
    assert x.mean(0).abs().max() < 0.03
    assert x.square().mean().sqrt().item() == pytest.approx(spread(), rel=0.01)


# ---------------------------------------------------------------- measurements


def test_jacobian_and_gradient_of_the_divergence() -> None:
    z = noisy_points(5, 0.6)  # more rows than go through a network at once

    def field(z: Tensor) -> Tensor:
        return torch.sin(z) * z.roll(1, -1)

    whole = torch.func.vmap(torch.func.jacrev(lambda x: field(x.reshape(1, 1, 8, 8)).flatten()))(z.flatten(1))
    torch.testing.assert_close(jacobian(field, z), whole)
    # ∇·f = Σ cos(z_i) z_{i-1}
    gradient = -torch.sin(z) * z.roll(1, -1) + torch.cos(z.roll(-1, -1))
    torch.testing.assert_close(divergence_gradient(field, z), gradient)


def test_fields_that_keep_the_law_have_no_gradient_of_the_residual() -> None:
    exact, z = ExactScore(0.6), noisy_points(4, 0.6)
    probe, move = signs(z, generator(3)), 0.01 * torch.randn(z.shape, generator=generator(4)).double()
    first, errors = first_derivatives(exact, exact, z, move)
    assert first["size"] == pytest.approx(1)
    assert first["change"] == pytest.approx(first["exact_change"]) > 0
    assert max(first["error"], first["asymmetry"], errors.max().item()) < 1e-10
    second = second_derivatives(exact, exact, z, probe)
    assert second["second"] == pytest.approx(second["exact_second"])
    assert second["probe_noise"] == pytest.approx(second["exact_probe_noise"])
    assert max(second["residual"], second["second_error"]) < 1e-10

    turned = Turned(exact, 0.5)
    assert first_derivatives(turned, exact, z, move)[0]["error"] > 0.1
    assert second_derivatives(turned, exact, z, probe)["residual"] < 1e-10
    scaled = second_derivatives(lambda z: 1.1 * exact(z), exact, z, probe)
    assert scaled["residual"] == pytest.approx(0.1)  # ∇r = 0.1 (∇(∇·s) + 2 J_s s)
    assert second_derivatives(lambda z: 0 * z, exact, z, probe)["residual"] == pytest.approx(1)


def test_roughness_is_the_wave_number_of_the_error() -> None:
    """An error sin(k·x) in one pixel has a Jacobian |k| times its own size."""
    exact, z = ExactScore(1.0), noisy_points(200, 1.0)
    k = torch.zeros(1, 8, 8).double()
    k[0, 3, 3] = 7.0

    def field(z: Tensor) -> Tensor:
        return exact(z) + torch.sin((z * k).sum((1, 2, 3), keepdim=True)) * (k > 0)

    found = first_derivatives(field, exact, z, torch.zeros_like(z))[0]["roughness"]
    assert found == pytest.approx(7 * math.sqrt(1 + spread() ** 2), rel=0.1)


def test_seams_are_between_tokens() -> None:
    across, inside = seam_pairs((4, 4))
    assert (across.sum().item(), inside.sum().item()) == (2 * 16, 2 * 96)
    place = torch.arange(PIXELS).reshape(8, 8)
    assert across[place[3, 0], place[4, 0]]
    assert inside[place[0, 0], place[0, 1]]
    assert not (across & inside).any()
    across, inside = seam_pairs((1, 8))
    assert across[place[0, 0], place[1, 0]]
    assert inside[place[0, 3], place[0, 4]]
    assert not seam_pairs((1, 1))[1].any()


def test_quality_of_the_exact_score_and_of_a_wrong_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=2000)

    def exact(z: Tensor, sigma: Tensor) -> Tensor:
        return ExactScore(sigma.item())(z)

    assert excess(run, exact, 0.6) < 1e-10
    # Without denoising the error is that of the noise, whose excess over the least error is 1 - 1/…: by the definition.
    x, z = noisy(run, 2000, 0.6, "denoised", "0.6")
    least = (z + 0.36 * ExactScore(0.6)(z) - x).square().sum()
    gap = ((z - x).square().sum() / least - 1).item()
    assert excess(run, lambda z, sigma: 0 * z, 0.6) == pytest.approx(gap, rel=0.05)
    true = compare(run, noisy(run, 2000, run.config.sigma_min, "other")[1])
    assert true["pixels"] < 0.5
    assert true["waves"] < 0.5
    wrong = compare(run, noisy(run, 2000, 1.0, "other")[1])
    assert wrong["pixels"] > 4
    assert wrong["waves"] > true["waves"]
