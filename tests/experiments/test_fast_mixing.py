"""Tests of fast mixing: measurements on fields with known mixing and sampling, and a repeated run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.common.objectives import FLUX, MixingTerm, times_sigma
from experiments.common.run import Run
from experiments.fast_mixing import EXPERIMENT
from experiments.fast_mixing.experiment import main
from experiments.fast_mixing.measure import chains, log_steps, tuned
from experiments.fast_mixing.mixture import fast, fields, make_trainer
from experiments.fast_mixing.problem import EXACT, VARIANCE, circulating, exact_score, longer, noised
from experiments.fast_mixing.proxy import plain_divergence, published_ratios, transport_cost
from experiments.fast_mixing.steps import GRID, PAPER, PROCEDURES, TUNED, Steps, tune
from experiments.images import fidelity
from fluxmatching import exponential_schedule, mixing_loss, predictor_corrector
from fluxmatching.fields import NoisyField

FINISHED = {"chain_steps": 400}  # changes of the run `finished`


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def test_autocorrelation_time_of_the_exact_score_at_large_noise(tmp_path: Path) -> None:
    """At large noise p_σ is nearly N(0, v I), and a step h is an autoregression with memory 1 - h/v: 2v/h - 1 steps."""
    run = make_run(tmp_path, mixture_sigma=20.0, chains=400, chain_steps=3000)
    time, end = chains(run, lambda z: exact_score(z, torch.tensor(20.0)), seed=0)
    variance = 400 + VARIANCE + 1.8**2 / 2
    assert time == pytest.approx((2 * variance / 40 - 1) * 0.1, rel=0.1)
    assert end.var().item() == pytest.approx(variance / (1 - 20 / variance), rel=0.15)  # of the discrete chain


def test_a_circulating_field_mixes_faster_and_preserves_the_density(tmp_path: Path) -> None:
    """s + 2 J s has the stationary density of s and mixes faster: a known case of the effect that is measured."""
    run = make_run(tmp_path, mixture_sigma=1.0, chains=400, chain_steps=4000, langevin_step_size=0.02)
    level = torch.tensor(1.0)
    time, end = chains(run, lambda z: circulating(2.0)(z, level), seed=0)
    run = make_run(tmp_path / "b", mixture_sigma=1.0, chains=400, chain_steps=4000)
    slow, _ = chains(run, lambda z: exact_score(z, level), seed=0)
    assert time < 0.5 * slow
    exact = noised(1.0).sample(4000, torch.Generator().manual_seed(1))
    assert end.square().sum(1).mean().item() == pytest.approx(exact.square().sum(1).mean().item(), rel=0.15)


def test_chains_that_are_too_short_are_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixture_sigma=0.3, chains=20, chain_steps=50)
    time, _ = chains(run, lambda z: exact_score(z, torch.tensor(0.3)), seed=0)
    assert time == float("inf")


def test_exact_score_is_sampled_better_with_more_steps_and_with_tuned_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixture_steps=(3, 30), tuned_steps=(3,), exact_samples=2000, thinning=7)
    log_steps(run, exact_score, EXACT, seed=0)
    few, many = (run.by_seed("steps", "distance", steps=steps, procedure=PAPER)[0] for steps in (3, 30))
    assert many < 0.6 * few
    assert run.by_seed("steps", "distance", procedure=TUNED)[0] < 0.6 * few


def test_a_longer_score_is_tuned_to_shorter_steps(tmp_path: Path) -> None:
    """2 s is s with steps of twice the length: tuned for both, the products of length and scale agree."""
    run = make_run(tmp_path, mixture_samples=2000, thinning=1)
    monotone = [Steps(0.16, scale, 0) for scale in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)]

    def best(field: NoisyField) -> float:
        def distance(steps: Steps, count: int) -> float:
            x = 10 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
            found = steps.sample(field, x, 3, (0.05, 10.0), torch.Generator().manual_seed(1))
            return float((found.square().sum(1).mean() - 1.8**2 - 2 * 0.0525).abs())

        return tune(distance, monotone, 500, 1000, 3).scale

    assert best(exact_score) == pytest.approx(2 * best(longer(2.0)), rel=0.02)
    assert tuned(make_run(tmp_path / "b"), exact_score, EXACT, 2, 0) in GRID
    assert run.config.thinning == 1


def test_tuning_judges_the_best_again_and_leaves_out_samples_that_diverged() -> None:
    judged: list[tuple[float, int]] = []

    def distance(steps: Steps, count: int) -> float:
        judged.append((steps.ratio, count))
        if steps.ratio == 0.1:
            return float("nan")
        return abs(steps.ratio - (0.4 if count == 10 else 0.2))

    grid = [Steps(ratio) for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    assert tune(distance, grid, 10, 100, 3).ratio == 0.3  # 0.2 is not among the best three of the first round
    assert sorted(ratio for ratio, count in judged if count == 100) == [0.3, 0.4, 0.5]


def test_default_steps_are_algorithm_3_and_options_change_it_as_named() -> None:
    x = 10 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def sample(steps: Steps, field: NoisyField = exact_score) -> Tensor:
        return steps.sample(field, x, 4, (0.05, 10.0), torch.Generator().manual_seed(1))

    sigmas = exponential_schedule(4, 0.05, 10.0)
    plain = predictor_corrector(exact_score, x, sigmas, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample(Steps()), plain, rtol=0, atol=0)
    last = torch.tensor(0.05)
    torch.testing.assert_close(sample(Steps(denoise=True)), plain + last**2 * exact_score(plain, last))
    torch.testing.assert_close(sample(Steps(scale=1.25)), sample(Steps(), longer(1.25)))
    levels = Steps(spacing=1.0).levels(4, 0.05, 10.0)
    torch.testing.assert_close(levels, torch.linspace(10.0, 0.05, 5, dtype=torch.float64))


def test_a_clamped_denoiser_stays_in_the_range_of_the_data() -> None:
    z, sigma = 5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.8)
    plain = z + sigma**2 * exact_score(z, sigma)
    clamped = z + sigma**2 * Steps(clamp=True).modify(exact_score)(z, sigma)
    assert plain.abs().max() > 1.5
    torch.testing.assert_close(clamped, plain.clamp(-1, 1), rtol=0, atol=1e-5)
    x = Steps(clamp=True, denoise=True).sample(exact_score, z, 4, (0.05, 10.0), torch.Generator().manual_seed(1))
    assert x.abs().max() <= 1 + 1e-5


def test_transport_costs_are_those_of_an_independent_sinkhorn_solver() -> None:
    ot = pytest.importorskip("ot")
    x, y = torch.randn(2, 2, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = torch.cdist(x, y).square()
    weights = torch.full((12,), 1 / 12, dtype=torch.float64).numpy()
    for found, cost in zip(transport_cost(costs, 0.5, 2000), costs, strict=True):
        plan = ot.sinkhorn(weights, weights, cost.numpy(), 0.5, numItermax=10_000, stopThr=1e-13)
        assert found.item() == pytest.approx(float((plan * cost.numpy()).sum()), rel=1e-6)
    assert plain_divergence(x, x).abs().max() < 1e-12


def test_the_published_proxy_steps_along_sigma_times_the_field() -> None:
    x = noised(0.0).sample(512, torch.Generator().manual_seed(0)).unflatten(0, (2, 256))

    def ratios(field: NoisyField, sigma: float) -> Tensor:
        return published_ratios(field, x, sigma, torch.Generator().manual_seed(1))

    # Where the drift σ f is the way back to the means, the ratio falls below that of no drift at all.
    assert (ratios(exact_score, 2.0) < ratios(lambda z, sigma: 0 * z, 2.0)).all()
    torch.testing.assert_close(ratios(lambda z, s: exact_score(z, s) / s, 2.0), ratios(longer(0.5), 2.0))


def test_no_proxy_falls_with_circulation_and_both_fall_with_a_longer_score() -> None:
    """The fields s + Js and s have one stationary density; the first mixes faster, and 1.25 s has another density."""
    x = noised(0.0).sample(4 * 128, torch.Generator().manual_seed(0)).unflatten(0, (4, 128))

    def proxies(field: NoisyField) -> tuple[float, float]:
        ours = sum(mixing_loss(field, batch, 0.7, seed=k)[0].item() for k, batch in enumerate(x)) / len(x)
        return ours, published_ratios(field, x, 0.7, torch.Generator().manual_seed(1)).mean().item()

    for score, turning, long in zip(
        proxies(exact_score), proxies(circulating(1.0)), proxies(longer(1.25)), strict=True
    ):
        assert turning > score + 0.005
        assert long < score - 0.005


def test_the_weight_of_the_proxy_and_its_drift_count(tmp_path: Path) -> None:
    def loss(name: str, drift: bool) -> float:
        run = make_run(tmp_path / f"{name}{drift}", mixture_mixing_weights=(1.0, 3.0), drift_times_sigma=drift)
        run.backend = "torch"
        # Seed 2 draws a large σ, so that the loss is small and its difference is not lost in rounding.
        return make_trainer(run, name, 2, iterations=1).step().item()

    for drift in (False, True):
        plain, once, thrice = (loss(name, drift) for name in (FLUX, fast(1.0), fast(3.0)))
        assert abs(once - plain) > 1e-3
        assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-3)
    assert abs(loss(fast(3.0), True) - loss(fast(3.0), False)) > 1e-3


def test_the_drift_times_sigma_is_that_of_a_field_times_sigma() -> None:
    x = noised(0.0).sample(64, torch.Generator().manual_seed(0))
    found = mixing_loss(times_sigma(exact_score), x, 3.0, seed=0)
    torch.testing.assert_close(found, mixing_loss(longer(3.0), x, 3.0, seed=0))


def test_smoke_run_and_its_summary(finished: Run) -> None:
    names = fields(finished.config)
    assert [row["field"] for row in finished.rows("mixture")] == list(names)
    wanted = {
        (f, p, k) for f in names for p, k in ((PAPER, 2), (PAPER, 4), ("published", 2), ("published", 4), (TUNED, 2))
    }
    assert {(row["field"], row["procedure"], row["steps"]) for row in finished.rows("steps")} == wanted
    assert {(row["procedure"], row["steps"]) for row in finished.rows("pictures")} == {
        (procedure, k) for procedure in PROCEDURES for k in (2, 3)
    }
    assert {path.stem for path in finished.figures} == {
        "steps", "pictures", "mixture", "few_steps", "mixing", "training", "distance"
    }  # fmt: skip
    summary = (finished.out / "summary.md").read_text()
    assert "training step, fast flux" in summary
    assert "mixture, tuned, 2 steps: distance, fast flux, λ = 3 / flux / DSM" in summary


@pytest.mark.usefixtures("unpainted")
def test_the_mixture_alone_needs_no_images(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("summary*"))
    main(make_run(tmp_path, with_images=False, with_training=False, dataset="cifar10", **FINISHED))
    summary = (tmp_path / "summary.md").read_text()
    assert "images," not in summary
    assert "λ = 3" not in summary
    assert "exact score / best of" in summary


@pytest.mark.usefixtures("unpainted")
def test_of_a_finished_run_nothing_is_trained_again(finished: Run) -> None:
    rows = finished.rows()
    main(finished)
    assert finished.rows() == rows


@pytest.mark.usefixtures("unpainted")
def test_fid_by_number_of_steps_is_in_the_summary(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "check", lambda weights: None)
    monkeypatch.setattr(fidelity, "fid_and_inception_score", lambda *a: (12.5, 2.0))
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["kind"] != "pictures"))
    main(make_run(tmp_path, fid=True, procedures=(PAPER,), chain_steps=400))
    assert (
        "| images, fast flux, Algorithm 3: FID in 2, 3 steps | Fig. 6 | 12.50, 12.50 |"
        in (tmp_path / "summary.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 2}, "batch must be at least 4"),
        ({"mixture_batch": 3}, "mixture_batch must be at least 4"),
        ({"mixture_data": 10}, "mixture_data must be at least mixture_batch, got 10"),
        ({"steps": ()}, "steps, mixture_steps, tuned_steps and procedures must not be empty"),
        ({"procedures": ("best",)}, "procedures must be of Algorithm 3, published, tuned, got best"),
        ({"tuned_steps": (7,)}, "tuned_steps must be in mixture_steps"),
        ({"tuning_samples": 300}, "tuning_samples must be at most 250, got 300"),
        ({"steps": (0, 5)}, "steps must be above 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_the_circulating_field_preserves_the_density_and_is_no_gradient() -> None:
    """∇·(f p) = ∇·(s p), by automatic differentiation; its Jacobian is not symmetric."""
    z, sigma = torch.randn(50, 2, requires_grad=True), torch.tensor(0.7)

    def flow(field: NoisyField) -> torch.Tensor:
        density = noised(0.7).log_density(z).exp()
        carried = field(z, sigma) * density[:, None]
        return sum(torch.autograd.grad(carried[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(2))

    torch.testing.assert_close(flow(circulating(1.0)), flow(exact_score), rtol=1e-3, atol=1e-6)
    field = circulating(1.0)(z, sigma)
    jacobian = [torch.autograd.grad(field[:, d].sum(), z, retain_graph=True)[0] for d in range(2)]
    assert (jacobian[0][:, 1] - jacobian[1][:, 0]).abs().min() > 1e-3


def test_the_weight_of_images_reaches_their_loss() -> None:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), mixing_weight=0.7)
    assert config.loss_options() == {"chunk_size": config.chunk_size, "mixing": MixingTerm(0.7, True)}
