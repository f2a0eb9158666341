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
from experiments.architectures.training import OBJECTIVES, make_field
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
    assert 0 < first["change"] == pytest.approx(first["exact_change"])
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
    run = make_run(tmp_path, samples=300)

    def exact(z: Tensor, sigma: Tensor) -> Tensor:
        return ExactScore(sigma.item())(z)

    assert excess(run, exact, 0.6) < 1e-10
    # Without denoising the error is that of the noise; what it has above the least one is the excess.
    x, z = noisy(run, 300, 0.6, "denoised", "0.6")
    least = (z + 0.36 * ExactScore(0.6)(z) - x).square().sum()
    gap = ((z - x).square().sum() / least - 1).item()
    assert excess(run, lambda z, sigma: 0 * z, 0.6) == pytest.approx(gap, rel=0.05)
    true, wrong = (
        compare(run, noisy(run, 300, sigma, "other")[1] * factor)
        for sigma, factor in ((run.config.sigma_min, 1.0), (1.0, 0.5))
    )
    assert true["pixels"] < 1.2
    assert wrong["pixels"] > 3
    assert wrong["waves"] > 1.5 * true["waves"]


# ---------------------------------------------------------------- networks and methods


def test_networks_have_about_equal_numbers_of_parameters(tmp_path: Path) -> None:
    run = Run(EXPERIMENT, "small", EXPERIMENT.config("small"), None, torch.device("cpu"), 0, tmp_path, progress=False)
    counts = {name: sum(p.numel() for p in make_field(run, name, 0).parameters()) for name in ARCHITECTURES}
    transformers = [count for name, count in counts.items() if name != UNET]
    assert max(transformers) < 1.1 * min(transformers)
    assert counts[UNET] < 1.7 * min(transformers)


@pytest.mark.parametrize(("name", "patch"), [(PATCH_1, 1), (PATCH_2, 2), (PATCH_4, 4)])
def test_tokens_are_square_patches(name: str, patch: int, tmp_path: Path) -> None:
    """Without attention a pixel sees its own patch and no other."""
    network = make_field(make_run(tmp_path), name, 0).network.double()
    for block in network.blocks:
        torch.nn.init.zeros_(block.after_attention.weight)
    seen = jacobian(lambda z: network(z, torch.zeros(len(z)).double()), noisy_points(1, 0.6))[0] != 0
    axis = torch.arange(8) // patch
    row, col = axis.repeat_interleave(8), axis.repeat(8)
    assert torch.equal(seen, (row[:, None] == row) & (col[:, None] == col))


def test_a_token_of_rows_is_a_row_and_a_convolution_joins_patches(tmp_path: Path) -> None:
    run, z = make_run(tmp_path), noisy_points(1, 0.6)
    rows = make_field(run, ROWS, 0).network.double()
    for block in rows.rows.blocks:
        torch.nn.init.zeros_(block.after_attention.weight)
    seen = jacobian(lambda z: rows(z, torch.zeros(len(z)).double()), z)[0] != 0
    row = torch.arange(PIXELS) // 8
    assert torch.equal(seen, row[:, None] == row)
    joined = make_field(run, PATCH_4_CONV, 0).network.double()
    plain = make_field(run, PATCH_4, 0).network.double()
    plain.load_state_dict({name: v for name, v in joined.state_dict().items() if not name.startswith("last")})
    c_noise = torch.zeros(1).double()
    torch.testing.assert_close(joined(z, c_noise), joined.last(plain(z, c_noise)))


@pytest.mark.parametrize("name", [UNET, PATCH_2])
def test_methods_agree_with_the_difference_of_pullbacks(name: str, tmp_path: Path) -> None:
    """The gradient at one pixel, from values of the network alone, in float64."""
    run, sigma = make_run(tmp_path), 0.6
    network, z = make_field(run, name, 0).double(), noisy_points(1, sigma)
    probe, score, step = signs(z, generator(3)), ExactScore(sigma)(z), 1e-4
    level = torch.tensor(sigma).double()

    def directional(point: Tensor) -> Tensor:  # εᵀ J ε + v·f with differences in place of derivatives
        slope = (network(point + step * probe, level) - network(point - step * probe, level)) / (2 * step)
        return (slope * probe).sum() + (network(point, level) * score).sum()

    unit = torch.zeros_like(z)
    unit[0, 0, 2, 5] = step
    true = (directional(z + unit) - directional(z - unit)) / (2 * step)
    single = make_field(run, name, 0)
    for method in ("double_backward", "finite_difference"):
        found = attempt(run, lambda z: single(z, level.float()), (z, score, probe), sigma, method, "float32")
        assert found is not None
        assert found[0, 0, 2, 5].item() == pytest.approx(true.item(), rel=5e-3, abs=1e-3)


def test_forward_mode_fails_for_the_unet_alone(finished: Run) -> None:
    for row in finished.rows("method"):
        failed = row[column("forward_over_reverse", "float32")] is None
        assert failed == (row["architecture"] == UNET)
        assert row[column("double_backward", "float32")] < 1e-4


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"data": 4}, "data must be at least 8, got 4"),
        ({"levels": ()}, "levels must not be empty"),
        ({"sigma_min": 20.0}, "0 < sigma_min < sigma_max must hold, got 20.0 and 4.0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert {path.stem for path in finished.figures} == {"derivatives", "quality", "methods"}
    assert [(row["objective"], row["architecture"]) for row in finished.rows("model")] == [
        (objective, architecture) for objective in OBJECTIVES for architecture in ARCHITECTURES
    ]
    measured = {(row["objective"], row["architecture"]) for row in finished.rows("derivatives")}
    assert measured >= {(UNTRAINED, architecture) for architecture in ARCHITECTURES}
    text = (finished.out / "summary.md").read_text()
    assert "hypothesis: rising with the patch" in text
    assert "forward_over_reverse fails" in text


def test_a_run_that_lost_its_last_rows_ends_as_it_would_have(copied: Run) -> None:
    metrics, rows = copied.out / "metrics.jsonl", copied.rows()
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-2]))
    shutil.rmtree(copied.out / "models" / "rows-DSM-0")  # trained again
    main(copied)
    assert copied.rows() == rows
