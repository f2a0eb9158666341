"""Checks of augment_images: the law, fields v by automatic differentiation, losses, and a repeated run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.augment import chains
from experiments.augment.chains import CONSTANT, Schedule
from experiments.augment.problems import make_problem
from experiments.augment_images.experiment import EXPERIMENT, main
from experiments.augment_images.fields import MixtureScore, TurningField
from experiments.augment_images.law import EVENT, NOISE, leading_plane, make_law
from experiments.augment_images.measure import (
    DRAWS,
    FIELDS,
    OF_DIFFUSERS,
    SAMPLERS,
    SIGMA_MIN,
    TRUTH,
    distances,
    place,
    schedules,
)
from experiments.augment_images.results import MARGIN, results
from experiments.augment_images.training import EXACT, LEARNED, PIPELINE, ImageLoss, PipelineLoss, make_field
from experiments.common.mixture import GaussianMixture
from experiments.common.run import Run
from fluxmatching import AugmentedField, field_from_diffusers

diffusers: Any = pytest.importorskip("diffusers")
LAW = make_law()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def turning_field(score: nn.Module, low: float = 1.0, high: float = 4.0) -> TurningField:
    torch.manual_seed(0)
    v = TurningField(score, LAW.basis, NOISE, low, high, 8)
    nn.init.normal_(v.weights)
    return v


# ---------------------------------------------------------------- the law


def test_the_plane_of_the_templates_holds_all_that_is_not_normal() -> None:
    torch.testing.assert_close(LAW.basis.T @ LAW.basis, torch.eye(2), atol=1e-6, rtol=0)
    offsets = LAW.templates - LAW.templates.mean(0)
    torch.testing.assert_close(offsets @ LAW.basis @ LAW.basis.T, offsets, atol=1e-5, rtol=0)
    sides = torch.pdist(LAW.templates)
    assert sides.max() < 1.1 * sides.min()


@pytest.mark.parametrize("sigma", [0.5, 2.5])
def test_images_have_the_law_of_the_problem(sigma: float) -> None:
    images = LAW.sample(40_000, sigma, generator()).flatten(1)
    problem = LAW.problem(sigma)
    assert problem.bias((images @ LAW.basis).reshape(100, 400, 2)) < 0.005
    wrong = 1.3 * (images - images.mean(0)) + images.mean(0)
    assert problem.bias((wrong @ LAW.basis).reshape(100, 400, 2)) > 0.02


def test_leading_plane_of_data_is_that_of_the_templates() -> None:
    found = leading_plane(LAW.sample(4096, 0.0, generator()))
    cosines = torch.linalg.svdvals(found.T @ LAW.basis)
    assert cosines.min() > 0.999


def test_distances_of_exact_and_of_wrong_images() -> None:
    exact = LAW.sample(2000, SIGMA_MIN, generator())
    found = distances(LAW, exact, generator(1))
    assert found["shares"] < 0.03
    assert abs(found["energy"]) < 0.2
    assert found["width"] == pytest.approx(1, abs=0.01)
    nearest = torch.cdist(exact.flatten(1), LAW.templates).argmin(1)
    two = distances(LAW, exact[nearest > 0], generator(1))
    assert two["shares"] == pytest.approx(1 / 3, abs=0.03)
    assert two["energy"] > 1
    blurred = LAW.sample(2000, 2 * SIGMA_MIN, generator())
    wanted = ((NOISE**2 + 4 * SIGMA_MIN**2) / (NOISE**2 + SIGMA_MIN**2)) ** 0.5
    assert distances(LAW, blurred, generator(1))["width"] == pytest.approx(wanted, abs=0.01)


# ---------------------------------------------------------------- fields


def test_mixture_score_is_the_gradient_of_the_density() -> None:
    sigma = torch.tensor([0.3, 1.0, 4.0])
    z = LAW.sample(3, 1.0, generator())
    found = MixtureScore(LAW.templates, NOISE)(z, sigma)
    for point, level, score in zip(z, sigma, found, strict=True):
        flat = point.flatten().requires_grad_()
        density = LAW.mixture(level.item()).log_density(flat)
        torch.testing.assert_close(score.flatten(), torch.autograd.grad(density, flat)[0], atol=1e-3, rtol=1e-4)


def outflow(v: nn.Module, sigma: float) -> Tensor:
    """∇·(p v)/p = ∇·v + v·∇log p of images at some points, by automatic differentiation in all 64 pixels."""
    x = LAW.sample(5, sigma, generator()).double().requires_grad_()
    values = v(x, sigma).flatten(1)
    slopes = [torch.autograd.grad(values[:, d].sum(), x, retain_graph=True)[0].flatten(1)[:, d] for d in range(64)]
    score = MixtureScore(LAW.templates.double(), NOISE)(x, sigma).flatten(1)
    return torch.stack(slopes).sum(0) + (values * score).sum(1)


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_exact_fields_keep_the_law_whatever_their_parameters(sigma: float) -> None:
    exact = turning_field(MixtureScore(LAW.templates @ LAW.basis, NOISE)).double()
    assert exact(LAW.sample(5, sigma, generator()).double(), sigma).abs().max() > 0.1
    assert outflow(exact, sigma).abs().max() < 1e-5  # the basis is rounded to float32
    wrong = turning_field(MixtureScore(LAW.templates @ LAW.basis, 2.0)).double()
    assert outflow(wrong, sigma).abs().max() > 1e-2


def test_fields_fade_out_beyond_their_noise_levels() -> None:
    v = turning_field(MixtureScore(LAW.templates @ LAW.basis, NOISE), low=1.0, high=2.0)
    wide = turning_field(MixtureScore(LAW.templates @ LAW.basis, NOISE), low=0.01, high=100.0)
    sigma = torch.tensor([0.4, 0.5, 2**-0.5, 1.0, 1.5, 2.0, 2**1.5, 4.0, 9.0])
    z = LAW.sample(len(sigma), 1.0, generator())
    fade = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(v(z, sigma), fade.reshape(-1, 1, 1, 1) * wide(z, sigma), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- losses and chains


def test_pipeline_loss_is_the_error_of_the_predicted_noise() -> None:
    """A network that returns its input is right where x_t is the noise: for x = 0 up to the factor √(1 - ᾱ_t)."""
    network = nn.Identity()
    network.forward = lambda x, t: SimpleNamespace(sample=x)  # type: ignore[method-assign]
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1, beta_start=0.36, beta_end=0.36)
    loss, _ = PipelineLoss(network, scheduler)(torch.zeros(400, *EVENT), seed=0)
    assert loss.item() == pytest.approx((1 - 0.36**0.5) ** 2, rel=0.03)


def test_loss_of_v_trains_v_alone_and_vanishes_where_it_should() -> None:
    score = nn.Linear(64, 64)  # a model with parameters
    model = nn.Module()
    model.layer = score
    truth = MixtureScore(LAW.templates, NOISE)
    model.forward = lambda z, sigma: truth(z, sigma) + 0 * score(z.flatten(1)).reshape(z.shape)  # type: ignore[method-assign]
    v = turning_field(MixtureScore(LAW.templates @ LAW.basis, NOISE), 1.5, 3.0)
    loss = ImageLoss(
        AugmentedField(model, v), (1.5, 3.0), flux_weight=1.0, defect_weight=1.0, law_weight=1.0, backend="torch"
    )
    total, terms = loss(LAW.sample(256, 0.0, generator()), seed=1)
    total.backward()
    assert score.weight.grad is None
    assert v.weights.grad is not None
    assert set(terms) == {"loss", "memory", "defect", "flux", "law"}
    assert 0 < terms["memory"] < 1
    nn.init.zeros_(v.weights)
    nn.init.zeros_(v.constant)
    _, still = loss(LAW.sample(1500, 0.0, generator()), seed=1)
    assert still["memory"].item() == pytest.approx(1, abs=0.06)
    assert still["flux"].item() == pytest.approx(0, abs=1e-6)
    assert still["defect"] < terms["defect"]


def test_chains_in_more_dimensions_cost_what_they_cost_in_the_plane() -> None:
    means = torch.zeros(1, 2)
    problem, schedule = make_problem(means, 0.2, 0.5), Schedule(CONSTANT, (0.3,))
    basis = torch.linalg.qr(torch.randn(5, 2, generator=generator()))[0]
    mixture = GaussianMixture(means @ basis.T, problem.unit)
    found = chains.measure_mixture(mixture.score, problem, [schedule], 900, 100, 0, within=(mixture, basis))[schedule]
    assert found.evaluations == pytest.approx((2 - 0.3) / 0.3, rel=0.1)
    plain = chains.measure_mixture(problem.mixture.score, problem, [schedule], 900, 100, 0)[schedule]
    assert found.bias == pytest.approx(plain.bias, rel=0.3)


# ---------------------------------------------------------------- runs


def test_smoke_run_measures_every_sampler_with_every_field(finished: Run) -> None:
    found = {(row["sampler"], row["field"]) for row in finished.rows("sample")}
    assert found == {(DRAWS, TRUTH), (OF_DIFFUSERS, PIPELINE), *((s, f) for s in SAMPLERS for f in FIELDS)}
    assert [row["field"] for row in finished.rows("measured")] == list(FIELDS)
    assert {path.stem for path in finished.figures} == {"samples", "costs"}
    text = (finished.out / "summary.md").read_text()
    assert f"reverse SDE, {LEARNED}: error of shares; energy distance; width" in text


def test_the_score_model_is_the_saved_pipeline_and_is_not_trained(finished: Run) -> None:
    folder = finished.out / "models" / "pipeline-0"
    score, z = field_from_diffusers(folder), LAW.sample(3, 2.0, generator())
    for kind in (EXACT, LEARNED):
        field = make_field(finished, LAW, kind, 0)
        assert isinstance(field, AugmentedField)
        for frozen, saved in zip(field.score_model.parameters(), score.parameters(), strict=True):
            torch.testing.assert_close(frozen, saved, rtol=0, atol=0)
        torch.testing.assert_close(field(z, 2.0), score(z, 2.0) + field.v(z, 2.0))


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


def test_results_compare_with_the_pipeline(tmp_path: Path) -> None:
    run = make_run(tmp_path, bias=0.06)
    sizes = {schedule.kind: " ".join(f"{h:.3g}" for h in schedule.sizes) for schedule in schedules()}
    for field, evaluations, energy in (
        (TRUTH, 5.0, 1.0),
        (PIPELINE, 12.0, 2.0),
        (EXACT, 6.0, 2.1),
        (LEARNED, 24.0, 2.2),
    ):
        run.log(
            kind="cost", problem=place(2.5), field=field, seed=0, schedule=CONSTANT, sizes=sizes[CONSTANT],
            evaluations=evaluations, bias=0.02,
        )  # fmt: skip
        for name in SAMPLERS:
            run.log(kind="sample", sampler=name, field=field, seed=0, evaluations=9, shares=0, energy=energy, width=1)
    for name, field in ((DRAWS, TRUTH), (OF_DIFFUSERS, PIPELINE)):
        run.log(kind="sample", sampler=name, field=field, seed=0, evaluations=9, shares=0, energy=0.1, width=1)
    lines = {result.quantity: result for result in results(run)}
    assert MARGIN == 0.15
    for field, kept, gain in ((EXACT, True, "2.00"), (LEARNED, False, "0.50")):
        assert lines[f"reverse SDE, {field}: error of shares; energy distance; width"].passed is kept
        fewer = lines[f"σ = 2.5, {field}, bias 0.03: times fewer, best of all"]
        assert (fewer.ours, fewer.passed) == (gain, kept)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"channels": (6, 8)}, r"channels must be multiples of 4, got \(6, 8\)"),
        ({"low": 4.0}, "noise levels of v: 0 < sigma_min < sigma_max must hold, got 4.0 and 3.0"),
        ({"data": 10}, "data must be at least 32, got 10"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
