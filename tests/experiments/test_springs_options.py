"""Tests of what the published program does otherwise: labels, scaling, units, reference points; and of pauses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.common.registry import Paused
from experiments.common.run import Run
from experiments.springs import EXPERIMENT, sampling
from experiments.springs.experiment import main
from experiments.springs.fields import label_by_sigma, make_field
from experiments.springs.training import MODELS, data, evaluate, floor, make_trainer, model_data, sample, samples_file
from tests.experiments.test_springs import make_run

TINY: dict[str, Any] = {
    "seeds": 1, "data": 32, "iterations": 3, "batch": 8, "evaluations": 2, "width": 8, "blocks": 1, "heads": 2,
    "samples": 16, "sampling_steps": 4, "line_refs": 32, "line_batches": 2, "timed_steps": 1, "every": 5,
}  # fmt: skip


class Recorder(nn.Module):
    """Network that keeps what it is given and returns ones."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.x, self.c_noise = x, c_noise
        return torch.ones_like(x)


@pytest.mark.parametrize("input_scaling", [True, False])
def test_the_wrong_label_is_that_of_the_square_and_the_sampler_has_the_root(input_scaling: bool) -> None:
    network = Recorder()
    field = make_field(network, 2.0, input_scaling=input_scaling, wrong_label=True)  # type: ignore[arg-type]
    z, sigma = torch.full((3, 4), 5.0), torch.tensor(9.0)
    trained = field(z, sigma)
    assert network.c_noise.tolist() == pytest.approx([math.log(81.0) / 4] * 3)
    assert label_by_sigma(field)
    assert torch.equal(field(z, sigma), trained)  # apart from the label nothing changes
    at_nine = network.c_noise
    assert at_nine.tolist() == pytest.approx([math.log(9.0) / 4] * 3)

    right = make_field(network, 2.0, input_scaling=input_scaling, wrong_label=False)  # type: ignore[arg-type]
    right(z, sigma)
    assert torch.equal(network.c_noise, at_nine)
    assert not label_by_sigma(right)


def test_a_field_without_scaling_is_the_networks_output_over_sigma() -> None:
    network = Recorder()
    field = make_field(network, 2.0, input_scaling=False, wrong_label=False)  # type: ignore[arg-type]
    z = torch.full((3, 4), 5.0)
    torch.testing.assert_close(field(z, torch.tensor(4.0)), torch.full((3, 4), 0.25))
    assert torch.equal(network.x, z)


def test_only_score_matching_is_labeled_by_the_square(tmp_path: Path) -> None:
    """One step of DSM differs with the label, one of Flux Matching does not."""
    for objective, same in (("flux", True), ("DSM", False)):
        after = []
        for label in ("sigma", "sigma2"):
            trainer = make_trainer(make_run(tmp_path / label, dsm_label=label), objective, "full", 0, iterations=9)
            for _ in range(3):
                trainer.step()
            after.append(torch.cat([p.detach().flatten() for p in trainer.loss.parameters()]))
        assert torch.equal(*after) == same


def test_a_field_with_the_wrong_label_is_sampled_with_both(tmp_path: Path) -> None:
    run = make_run(tmp_path, dsm_label="sigma2")
    field = make_trainer(run, "DSM", "full", 0, iterations=9).average.module.get_submodule("field").eval()
    samples_file(run, "DSM", "full", 0).parent.mkdir(parents=True)
    with torch.no_grad():
        field.get_parameter("network.network.out.1.weight").normal_(generator=torch.Generator().manual_seed(0))
    own = sample(run, field, 0)
    row = evaluate(run, field, "DSM", "full", 0)
    assert set(row) == {"w2", "w2_fresh", "w2_own_label"}
    kept = torch.load(samples_file(run, "DSM", "full", 0), weights_only=True)
    assert not torch.equal(kept, own[:64].cpu())  # what counts is the published sampler
    assert row["w2"] != row["w2_own_label"]


def test_standardized_models_are_sampled_in_the_units_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, standardize=True)
    x, real = model_data(run).flatten(0, 1), data(run).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(4))
    assert make_trainer(run, "flux", "full", 0, iterations=1).loss.get_submodule("field").sigma_data == pytest.approx(
        1, abs=0.01
    )
    monkeypatch.setattr(sampling, "sample", lambda config, field, like, generator: torch.ones_like(like))
    found = sample(run, nn.Identity(), 0)
    torch.testing.assert_close(found[3, 7], real.mean(0) + real.std(0))
    assert torch.equal(model_data(make_run(tmp_path / "raw")), data(run))


def test_samplers_start_from_the_same_noise_and_the_flow_adds_none(tmp_path: Path) -> None:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), sampler="ode", sampling_steps=3)
    like, starts = torch.zeros(5, 3), []

    def still(z: Tensor, sigma: Tensor) -> Tensor:
        starts.append(z)
        return torch.zeros_like(z)

    end = sampling.sample(config, still, like, torch.Generator().manual_seed(2))  # type: ignore[arg-type]
    assert torch.equal(end, starts[0])
    assert torch.equal(end, config.sigma_max * torch.randn(5, 3, generator=torch.Generator().manual_seed(2)))
    reverse = dataclasses.replace(config, sampler="reverse")
    moved = sampling.sample(reverse, still, like, torch.Generator().manual_seed(2))  # type: ignore[arg-type]
    assert torch.equal(starts[3], end)
    assert not torch.equal(moved, end)


@pytest.mark.parametrize("objective", ["flux", "DSM"])
def test_reference_points_are_the_first_training_trajectories(tmp_path: Path, objective: str) -> None:
    loss = make_trainer(make_run(tmp_path, refs=32), objective, "full", 0, iterations=1).loss
    run = make_run(tmp_path / "default")
    assert torch.equal(loss.refs(data(run)[40:56]), data(run)[:32])
    assert make_trainer(run, objective, "full", 0, iterations=1).loss.refs(data(run)[:16]) is None


def test_repeated_trajectories_are_nearer_to_the_training_ones_than_new_ones(tmp_path: Path) -> None:
    row = floor(make_run(tmp_path, data=400, samples=200, every=5))
    assert row["repeated"] < 0.95 * row["w2"]
    assert row["repeated"] < row["repeated_fresh"]


def start(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("gpu"), **TINY, **changes)
    return Run(EXPERIMENT, "gpu", config, None, torch.device("cpu"), 0, out, progress=False)


def test_the_gpu_preset_in_pieces_equals_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny, with every option of the preset; a command of no time trains one iteration of one model."""
    monkeypatch.setattr("experiments.springs.experiment.draw", lambda *_: [])
    whole = start(tmp_path / "whole")
    assert whole.config.minutes == 9
    main(whole)
    pauses: list[str] = []
    for _ in range(30):
        run = start(tmp_path / "pieces", minutes=1e-9)
        try:
            main(run)
            break
        except Paused as pause:
            pauses.append(str(pause))
    assert pauses == [f"{objective}, {mask}, seed 0 at iteration 2 of 3" for objective, mask in MODELS]
    assert run.rows("model") == whole.rows("model")
    assert run.rows("field size") == whole.rows("field size")
    last = [row for row in run.rows("model") if row["iteration"] == 3]
    assert ["w2_own_label" in row for row in last] == [False, False, True, True]
    text = (run.out / "summary.md").read_text()
    assert "change of W2 by the mask, sampled with the label of its training: DSM" in text
