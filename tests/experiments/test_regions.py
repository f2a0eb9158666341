"""Checks of images of two parts: their joint distribution, linear fields in closed form, the mask, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.common.distances import bures_wasserstein2
from experiments.common.objectives import DSM, FLUX
from experiments.common.run import Run
from experiments.regions import EXPERIMENT, gaussian
from experiments.regions.exact import exact_field
from experiments.regions.experiment import main
from experiments.regions.images import (
    CORRELATION,
    DISPLACEMENT,
    center_correlation,
    displacement,
    draw_centers,
    draw_discs,
    draw_images,
    find_centers,
    mirrored,
)
from experiments.regions.networks import PartsNetwork
from experiments.regions.training import FULL, MASKED, MODELS, left_sees_right, make_trainer, samples_file
from experiments.springs import linear
from fluxmatching import EDMField

FEW = torch.tensor([[1.0, 0.4, 0.6, 0.1], [0.4, 1.2, 0.2, 0.7], [0.6, 0.2, 1.1, 0.3], [0.1, 0.7, 0.3, 1.3]]).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


# ---------------------------------------------------------------- images


def test_joint_distribution_of_the_centers() -> None:
    """Uniform on the left; the correlation of U and U + N is sd(U)/√(sd(U)² + δ²)."""
    centers = draw_centers(100_000, generator())
    left = centers[:, 0]
    assert (left.min().item(), left.max().item()) == pytest.approx((2, 5), abs=1e-3)
    assert pytest.approx(math.sqrt(0.75 / (0.75 + 1.0))) == CORRELATION
    assert center_correlation(centers) == pytest.approx(CORRELATION, abs=5e-3)
    assert displacement(centers) == pytest.approx(DISPLACEMENT, abs=5e-3)
    unrelated = torch.stack([centers[:, 0], centers[:, 1].roll(1, 0)], 1)
    assert center_correlation(unrelated) == pytest.approx(0, abs=0.02)


def test_mirrored_discs_are_mirror_images() -> None:
    centers = draw_centers(10, generator())[:, 0]
    torch.testing.assert_close(draw_discs(mirrored(centers)), draw_discs(centers).flip(-1))
    torch.testing.assert_close(mirrored(mirrored(centers)), centers)


def test_centers_are_found_in_images_and_in_noisy_ones() -> None:
    centers = draw_centers(200, generator())
    images = draw_discs(centers)
    found, error = find_centers(images)
    assert (found - centers).abs().max() < 0.051  # half a step of the grid
    assert error.max() < 0.03
    noisy, error = find_centers(images + 0.2 * torch.randn(images.shape, generator=generator(1)).double())
    assert (noisy - centers).square().mean().sqrt() < 0.2
    torch.testing.assert_close(error.mean(), torch.tensor(0.2).double(), rtol=0.05, atol=0)
    blank = find_centers(torch.rand(5, 2, 8, 8, generator=generator(2)))[1]
    assert blank.min() > 0.25


# ---------------------------------------------------------------- closed forms


def test_covariance_of_gaussian_images_is_that_of_samples() -> None:
    """Left part y, right part its mirror image plus δ times another one."""
    covariance = gaussian.image_covariance()
    smooth = covariance[:64, :64] - gaussian.JITTER * torch.eye(64).double()
    root = torch.linalg.cholesky(smooth + 1e-9 * torch.eye(64).double())
    y, other = (torch.randn(50_000, 64, generator=generator(k)).double() @ root.T for k in range(2))
    right = y.unflatten(1, (8, 8)).flip(2).flatten(1) + gaussian.DELTA * other
    found = torch.cat([y, right], 1).T.cov() + gaussian.JITTER * torch.eye(128).double()
    torch.testing.assert_close(found, covariance, atol=0.04, rtol=0)
    truth = 1 / math.sqrt(1 + gaussian.DELTA**2)
    assert gaussian.part_correlation(covariance) == pytest.approx(truth, abs=2e-3)


def test_stationary_covariance_is_that_of_a_long_simulation() -> None:
    """The Ornstein-Uhlenbeck process of the masked score in four dimensions, by small steps of its covariance."""
    matrix = linear.dsm_matrix(FEW, 2)
    step, identity = 1e-3, torch.eye(4).double()
    forward, noise = identity - step * matrix, 2 * step * identity
    for _ in range(20):  # doubling: 2^20 steps
        noise, forward = noise + forward @ noise @ forward.T, forward @ forward
    found = forward @ forward.T + noise
    torch.testing.assert_close(gaussian.stationary(matrix), found, rtol=2e-3, atol=2e-3)


def test_which_linear_fields_keep_the_joint_distribution() -> None:
    left = slice(0, 2)
    kept = {name: gaussian.stationary(field(FEW, 2)) for name, field in gaussian.FIELDS.items()}
    for name in (gaussian.SCORE, gaussian.FLUX):
        assert bures_wasserstein2(kept[name], FEW) < 1e-6
    masked = kept[gaussian.DSM]
    torch.testing.assert_close(masked[left, left], FEW[left, left])  # the left part moves by its own score
    assert masked[2:, :2].norm() < 0.9 * FEW[2:, :2].norm()
    # E|f - s|² under the mask: no field of that form is nearer to the score than that of score matching.
    inverse = torch.linalg.inv(FEW)

    def distance(matrix: Tensor) -> float:
        return ((matrix - inverse) @ FEW @ (matrix - inverse).T).trace().item()

    best = linear.dsm_matrix(FEW, 2)
    for seed in range(5):
        change = 0.1 * torch.randn(4, 4, generator=generator(seed)).double()
        change[:2, 2:] = 0
        assert distance(best + change) > distance(best)
    assert distance(linear.flux_matrix(FEW, 2)) > distance(best)


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("masked", [True, False])
def test_blocks_of_the_jacobian(masked: bool) -> None:
    torch.manual_seed(0)
    field = EDMField(PartsNetwork(8, masked), 0.3).double()
    x = torch.randn(1, 2, 3, 3, generator=generator(), dtype=torch.float64)
    for sigma in (0.05, 10.0):
        jacobian = torch.func.jacrev(lambda z, s=sigma: field(z, s))(x)[0, :, :, :, 0]
        left_of_right, right_of_left = jacobian[0, :, :, 1].abs(), jacobian[1, :, :, 0].abs()
        assert (left_of_right.max().item() == 0) == masked
        assert right_of_left.min() > 0
        assert left_sees_right(field, x, sigma) == left_of_right.max()


def test_models_of_a_seed_differ_in_mask_and_objective_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trainers = {model: make_trainer(run, *model, seed=0) for model in MODELS}
    first = trainers[FLUX, MASKED].loss.state_dict()
    for (objective, mask), one in trainers.items():
        for name, value in one.loss.named_parameters():
            assert torch.equal(value, first[name])
        assert one.loss.get_submodule("field.network").masked == (mask == MASKED)
        assert ("Score" in type(one.loss).__name__) == (objective == DSM)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"data": 8}, "data must be at least 16, got 8"),
        ({"sigma_min": 20.0}, "0 < sigma_min < sigma_max must hold, got 20.0 and 4.0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert {path.stem for path in finished.figures} == {"images", "agreement", "gaussian"}
    rows = finished.rows("model")
    assert [(row["objective"], row["mask"]) for row in rows] == list(MODELS)
    assert all((row["seen"] == 0) == (row["mask"] == MASKED) for row in rows)
    assert finished.rows("floor")[0]["displacement"] == pytest.approx(DISPLACEMENT, abs=0.3)
    text = (finished.out / "summary.md").read_text()
    assert "correlation under the mask: flux / score matching / exact score" in text
    assert f"Gaussian images, {gaussian.DSM}: correlation that the field keeps" in text


def test_a_run_that_lost_its_last_rows_ends_as_it_would_have(copied: Run) -> None:
    metrics, rows = copied.out / "metrics.jsonl", copied.rows()
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-2]))
    shutil.rmtree(samples_file(copied, DSM, FULL, 0).parent)  # the last model is trained again, the one before is not
    main(copied)
    assert copied.rows() == rows


def test_exact_masked_field_is_nearest_to_the_score() -> None:
    """Its left part is the mean of the score's left part given the left part: by self-normalized sums over p_σ."""
    refs, sigma = draw_images(6, generator())[:, :, 2:4, 2:4].double(), 0.5
    left = refs[:, 0].flatten(1)[:1] + 0.1
    right = refs[:, 1].flatten(1).repeat(20_000, 1)
    right = right + sigma * torch.randn(right.shape, generator=generator(1)).double()
    # Points with this left part, the right one from the estimate's mixture of the right parts alone, then weighted.
    z = torch.stack([left.expand_as(right), right], 1)
    points, parts = refs.flatten(1), refs[:, 1].flatten(1)
    joint = (torch.cdist(z.flatten(1), points).square() / (-2 * sigma**2)).logsumexp(1)
    proposed = (torch.cdist(right, parts).square() / (-2 * sigma**2)).logsumexp(1)
    weight = (joint - proposed).softmax(0)
    level = torch.tensor(sigma).double()
    full = exact_field(refs, FULL)(z.reshape(-1, 2, 2, 2), level)[:, 0].flatten(1)
    masked = exact_field(refs, MASKED)(z[:1].reshape(1, 2, 2, 2), level)
    truth = (weight.unsqueeze(1) * full).sum(0)
    torch.testing.assert_close(masked[0, 0].flatten(), truth, atol=0.05, rtol=0)
    assert (full.mean(0) - truth).abs().max() > 0.1
    torch.testing.assert_close(masked[:, 1], exact_field(refs, FULL)(z[:1].reshape(1, 2, 2, 2), level)[:, 1])


def test_images_have_two_parts() -> None:
    images = draw_images(5, generator())
    assert images.shape == (5, 2, 8, 8)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 0.01 < 0.95 < images.max() <= 1
