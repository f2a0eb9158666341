"""Tests of the flows of images: what is shared and what differs, measures against known flows, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.flow_images import EXPERIMENT, measure, training
from experiments.flow_images.experiment import main
from experiments.flow_images.measure import SHOWN, log_distances, log_pairing, log_straightness, pairing, shown_file
from experiments.flow_images.results import compare
from experiments.flow_images.training import NAMES, draw_noise, make_loss, make_pairs, make_trainer, model_folder
from experiments.flows.training import EXACT, INDEPENDENT, RECTIFIED
from experiments.images import datasets
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.stages import reference
from fluxmatching import Trainer

IMAGES = datasets.load("shapes")


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


class Constant(nn.Module):
    """v(x, t) = data - noise of the same row: straight lines to known images, in one evaluation."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__()
        self.velocity, self.calls = velocity, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity


# ---------------------------------------------------------------- measures


def test_a_flow_to_known_images_has_their_distance_in_any_number_of_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=40, chunk_size=40)
    model_folder(run, EXACT).mkdir(parents=True)
    wanted = datasets.to_numbers(IMAGES.test[:40])
    field = Constant(wanted - draw_noise(run, 40, IMAGES, "start"))
    log_distances(run, IMAGES, EXACT, field)
    rows = run.rows("distance")
    assert [(row["solver"], row["evaluations"]) for row in rows] == [
        ("Euler", 1), ("Euler", 2), ("Euler", 4), ("Heun", 2), ("Heun", 4),
    ]  # fmt: skip
    assert field.calls == sum(row["evaluations"] for row in rows)
    exact = frechet_distance(random_convolutions(wanted), reference(run, IMAGES, 40))
    assert [row["distance"] for row in rows] == pytest.approx([exact] * 5, rel=1e-3)
    assert torch.equal(torch.load(shown_file(run, EXACT, "Euler", 1), weights_only=True), IMAGES.test[:SHOWN])
    log_distances(run, IMAGES, EXACT, Constant(wanted))  # all rows are there
    assert run.rows("distance") == rows


def test_straight_lines_have_no_bend(tmp_path: Path) -> None:
    run = make_run(tmp_path, chunk_size=6)
    velocity = torch.randn(6, 3, 16, 16)
    log_straightness(run, IMAGES, INDEPENDENT, Constant(velocity))
    (row,) = run.rows("trajectories")
    assert row["ratio"] == pytest.approx(0, abs=1e-9)
    assert row["length"] == pytest.approx(velocity.square().flatten(1).sum(1).mean().item(), rel=1e-4)


def test_pairs_by_optimal_transport_are_nearer(tmp_path: Path) -> None:
    """Per coordinate, independent pairs are at 1 + E[x1²]."""
    run = make_run(tmp_path, minibatches=20, batch=16, pairs=16)
    log_pairing(run, IMAGES)
    assert 0.5 < pairing(run) < 0.99
    independent = next(row["distance"] for row in run.rows("pairing") if row["variant"] == INDEPENDENT)
    expected = 1 + datasets.to_numbers(IMAGES.train).square().mean().item()
    assert independent == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("second", "holds"), [(0.9, True), (1.1, False)])
def test_a_flow_must_be_better_in_one_evaluation_and_in_two(tmp_path: Path, second: float, holds: bool) -> None:
    run = make_run(tmp_path)
    for name, values, ratio in ((INDEPENDENT, (2.0, 1.0), 0.3), (EXACT, (1.5, second), 0.4)):
        for count, value in zip((1, 2), values, strict=True):
            run.log(kind="distance", variant=name, solver="Euler", evaluations=count, distance=value)
            run.log(kind="distance", variant=name, solver="Heun", evaluations=count, distance=100 - value)
        run.log(kind="trajectories", variant=name, ratio=ratio)
    straighter, closer = compare(run, EXACT)
    assert straighter.passed is False
    assert straighter.ours == "0.4000 / 0.3000"
    assert closer.passed is holds
    assert closer.ours == f"1.500 / 2.000; {second:.3f} / 1.000"


# ---------------------------------------------------------------- training and runs


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert [row["variant"] for row in finished.rows("trajectories")] == list(NAMES)
    assert len(finished.rows("distance")) == 3 * (3 + 2)
    numbers = [v for row in finished.rows() for v in row.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    assert {path.stem for path in finished.figures} == {"distance", "samples"}
    text = (finished.out / "summary.md").read_text()
    assert "Data: drawn discs" in text
    assert "rectified: that distance in 1, 2, 4 evaluations (Euler)" in text


def test_of_a_finished_run_nothing_is_trained_again(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_train_iteration")
    monkeypatch.delattr(training, "rectified_pairs")
    monkeypatch.delattr(measure, "integrate_flow")
    rows = copied.rows()
    main(copied)
    assert copied.rows() == rows


@pytest.mark.parametrize("kept", [2, 12])
def test_a_run_that_was_interrupted_ends_as_it_would_have(copied: Run, kept: int) -> None:
    """Killed among the rows of the first or second flow; the rectified flow is not even trained."""
    metrics, rows = copied.out / "metrics.jsonl", copied.rows()
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:kept]))
    shutil.rmtree(model_folder(copied, RECTIFIED))
    main(copied)
    assert copied.rows() == rows


def test_flows_share_all_but_their_pairs(copied: Run, tmp_path: Path) -> None:
    fresh = make_run(tmp_path / "fresh")
    losses = {name: make_loss(fresh, IMAGES, name) for name in NAMES[:2]}
    for p, q in zip(*(loss.field.parameters() for loss in losses.values()), strict=True):
        assert torch.equal(p, q)
    assert type(losses[EXACT].coupling).__name__ == "ExactCoupling"
    assert losses[INDEPENDENT].coupling is None
    trainers = [make_trainer(copied, IMAGES, name) for name in NAMES]
    assert trainers[0].options == trainers[1].options
    assert trainers[2].iteration == copied.config.rectified_iterations
    assert trainers[2].loss.paired
    assert torch.equal(trainers[2].minibatches.data, make_pairs(copied, IMAGES))
    # The rectified flow begins with the weights of the one that makes its pairs.
    begun = make_loss(copied, IMAGES, RECTIFIED).field.state_dict()
    for name, value in trainers[0].average.module.field.state_dict().items():
        assert torch.equal(begun[name], value)


def test_pairs_are_noise_and_where_the_flow_carries_it(copied: Run) -> None:
    pairs = make_pairs(copied, IMAGES)
    assert pairs.shape == (copied.config.pairs, 2, 3, 16, 16)
    x = draw_noise(copied, copied.config.pairs, IMAGES, "start of pairs")
    assert torch.equal(pairs[:, 0], x)
    field, steps = training.train(copied, IMAGES, INDEPENDENT), copied.config.pair_steps
    with torch.no_grad():
        for step in range(steps):
            t, h = torch.full((len(x),), step / steps), 1 / steps
            slope = field(x, t)
            x = x + h / 2 * (slope + field(x + h * slope, t + h))
    torch.testing.assert_close(pairs[:, 1], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"multipliers": ()}, "attention_level must be below 0, got 1"),
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"evaluations": (2, 4)}, r"evaluations must be increasing and begin with 1 and 2, got \(2, 4\)"),
        ({"evaluations": (1, 2, 2)}, "evaluations must be increasing"),
        ({"pairs": 5}, "pairs must be at least 8, got 5"),
        ({"precision": "fp16"}, "precision must be one of 32-true"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 5000, "pairs": 5000}, "batch must be at most the 1024"),
        ({"multipliers": (1, 1, 1, 1, 1, 1)}, "size must be a multiple"),
    ],
)
def test_settings_that_do_not_suit_the_data(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make_trainer(make_run(tmp_path, **changes), IMAGES, INDEPENDENT)
