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

from experiments.common.objectives import FAST, FLUX, OBJECTIVES
from experiments.common.run import Run
from experiments.fast_mixing import EXPERIMENT, mixture
from experiments.fast_mixing.experiment import main
from experiments.fast_mixing.mixture import exact_score, make_trainer, noised
from experiments.images import fidelity

FINISHED = {"chain_steps": 400}  # changes of the run `finished`


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def test_autocorrelation_time_of_the_exact_score_at_large_noise(tmp_path: Path) -> None:
    """At large noise p_σ is nearly N(0, v I), and a step h is an autoregression with memory 1 - h/v: 2v/h - 1 steps."""
    run = make_run(tmp_path, mixture_sigma=20.0, chains=400, chain_steps=3000)
    time, end = mixture.chains(run, lambda z: exact_score(z, torch.tensor(20.0)), seed=0)
    variance = 400 + mixture.VARIANCE + 1.8**2 / 2
    assert time == pytest.approx((2 * variance / 40 - 1) * 0.1, rel=0.1)
    assert end.var().item() == pytest.approx(variance / (1 - 20 / variance), rel=0.15)  # of the discrete chain


def test_a_circulating_field_mixes_faster_and_preserves_the_density(tmp_path: Path) -> None:
    """s + 2 J s has the stationary density of s and mixes faster: a known case of the effect that is measured."""
    run = make_run(tmp_path, mixture_sigma=1.0, chains=400, chain_steps=4000, langevin_step_size=0.02)
    turn = torch.tensor([[1.0, 2.0], [-2.0, 1.0]])

    def circulating(z: Tensor) -> Tensor:
        return exact_score(z, torch.tensor(1.0)) @ turn

    time, end = mixture.chains(run, circulating, seed=0)
    slow, _ = mixture.chains(make_run(tmp_path / "b", mixture_sigma=1.0, chains=400, chain_steps=4000),
                             lambda z: exact_score(z, torch.tensor(1.0)), seed=0)  # fmt: skip
    assert time < 0.5 * slow
    exact = noised(1.0).sample(4000, torch.Generator().manual_seed(1))
    assert end.square().sum(1).mean().item() == pytest.approx(exact.square().sum(1).mean().item(), rel=0.15)


def test_chains_that_are_too_short_are_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixture_sigma=0.3, chains=20, chain_steps=50)
    time, _ = mixture.chains(run, lambda z: exact_score(z, torch.tensor(0.3)), seed=0)
    assert time == float("inf")


def test_exact_score_is_sampled_better_with_more_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixture_steps=(3, 30), mixture_samples=500, mixture_sigma=1.5)
    mixture.measure(run, exact_score, mixture.EXACT, seed=0)
    few, many = (run.by_seed("steps", "w2", steps=steps)[0] for steps in (3, 30))
    assert many < 0.6 * few
    assert run.rows("mixture")[0]["ratio"] < 1


def test_the_weight_of_the_proxy_counts(tmp_path: Path) -> None:
    losses = []
    for objective, weight in ((FLUX, 1.0), (FAST, 1.0), (FAST, 3.0)):
        run = make_run(tmp_path / f"{objective}{weight}", mixture_mixing_weight=weight)
        # Seed 2 draws a large σ, so that the loss is small and its difference is not lost in rounding.
        losses.append(make_trainer(run, objective, 2, iterations=1, backend="torch").step().item())
    plain, once, thrice = losses
    assert abs(once - plain) > 1e-3
    assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-3)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    fields = (*OBJECTIVES, mixture.EXACT, mixture.CIRCULATING)
    assert [row["field"] for row in finished.rows("mixture")] == list(fields)
    assert {(row["field"], row["steps"]) for row in finished.rows("steps")} == {(f, k) for f in fields for k in (2, 4)}
    assert {row["steps"] for row in finished.rows("pictures")} == {2, 3}
    assert {path.stem for path in finished.figures} == {
        "steps", "pictures", "mixture", "mixing", "training", "distance"
    }  # fmt: skip
    assert "training step, fast flux" in (finished.out / "summary.md").read_text()


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
    main(make_run(tmp_path, fid=True, chain_steps=400))
    assert "| images, fast flux: FID in 2, 3 steps | Fig. 6 | 12.50, 12.50 |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 2}, "batch must be at least 4"),
        ({"mixture_batch": 3}, "mixture_batch must be at least 4"),
        ({"mixture_data": 10}, "mixture_data must be at least mixture_batch, got 10"),
        ({"steps": ()}, "steps and mixture_steps must not be empty"),
        ({"steps": (0, 5)}, "steps must be above 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_the_circulating_field_preserves_the_density_and_is_no_gradient() -> None:
    """∇·(f p) = ∇·(s p), by automatic differentiation; its Jacobian is not symmetric."""
    z, sigma = torch.randn(50, 2, requires_grad=True), torch.tensor(0.7)

    def flow(field: mixture.Field) -> torch.Tensor:
        density = noised(0.7).log_density(z).exp()
        carried = field(z, sigma) * density[:, None]
        return sum(torch.autograd.grad(carried[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(2))

    torch.testing.assert_close(flow(mixture.circulating), flow(exact_score), rtol=1e-3, atol=1e-6)
    field = mixture.circulating(z, sigma)
    jacobian = [torch.autograd.grad(field[:, d].sum(), z, retain_graph=True)[0] for d in range(2)]
    assert (jacobian[0][:, 1] - jacobian[1][:, 0]).abs().min() > 1e-3


def test_the_weight_of_images_reaches_their_loss() -> None:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), mixing_weight=0.7)
    assert config.loss_options() == {"chunk_size": config.chunk_size, "mixing_weight": 0.7}
