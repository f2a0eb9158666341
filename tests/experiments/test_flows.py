"""Tests of the flows: samplers against their moments, measures against closed forms, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from experiments.common.distances import wasserstein2
from experiments.common.run import Run
from experiments.flows import EXPERIMENT, measure, training
from experiments.flows.experiment import main
from experiments.flows.measure import (
    STABLE,
    TARGETS,
    log_distances,
    log_floors,
    log_repeats,
    log_trajectories,
    sample_gradients,
    start_and_new,
)
from experiments.flows.problems import (
    CHECKERBOARD,
    MOON_CENTER,
    MOON_NOISE,
    MOONS,
    PROBLEMS,
    RING_RADIUS,
    RING_STD,
    Problem,
    checkerboard,
    draw,
    eight_gaussians,
    moons,
    normal,
)
from experiments.flows.results import are_all, compare, is_negative, over_floors, standard_error, with_error
from experiments.flows.training import (
    EXACT,
    INDEPENDENT,
    RECTIFIED,
    VARIANTS,
    Velocity,
    make_loss,
    make_trainer,
    model_folder,
    variants,
)
from fluxmatching import LinearPath, Trainer

COUNT = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def check_moments(x: Tensor, covariance: list[list[float]]) -> None:
    """Mean 0 and that covariance, within five standard errors of each entry."""
    x, expected = x.double(), torch.tensor(covariance, dtype=torch.float64)
    products = x[:, :, None] * x[:, None, :]
    assert (x.mean(0).abs() < 5 * x.std(0) / len(x) ** 0.5).all()
    assert ((products.mean(0) - expected).abs() < 5 * products.std(0) / len(x) ** 0.5).all()


# ---------------------------------------------------------------- problems


def test_the_checkerboard_fills_its_dark_squares_evenly() -> None:
    x = checkerboard(COUNT, generator())
    assert x.abs().max() <= 2
    square = (x + 2).floor().clamp_max(3).long()
    assert (square.sum(1) % 2 == 0).all()
    counts = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16)
    assert chisquare(counts[counts > 0]).pvalue > 1e-4
    assert (counts > 0).sum() == 8
    within = ((x + 2) % 1 * 10).long().clamp_max(9)
    assert min(chisquare(torch.bincount(within[:, d], minlength=10)).pvalue for d in range(2)) > 1e-4
    # Four squares lie on one diagonal and two on either side: E[x1 x2] = (2·0.75 - 2·0.25)/4.
    check_moments(x, [[4 / 3, 1 / 4], [1 / 4, 4 / 3]])


def test_moons_lie_on_two_half_circles() -> None:
    x, center = moons(COUNT, generator()), torch.tensor(MOON_CENTER)
    distances = []
    for sign in (1, -1):
        point = sign * x + center
        ends = torch.stack([point - torch.tensor([side, 0.0]) for side in (1.0, -1.0)]).norm(dim=-1).amin(0)
        distances.append(torch.where(point[:, 1] >= 0, (point.norm(dim=1) - 1).abs(), ends))
    upper, lower = distances
    assert torch.minimum(upper, lower).max() < 5 * MOON_NOISE
    assert (upper < lower).double().mean().item() == pytest.approx(0.5, abs=0.01)
    cross = 1 / 8 - 1 / math.pi
    check_moments(x, [[0.75 + MOON_NOISE**2, cross], [cross, 0.5625 - 1 / math.pi + MOON_NOISE**2]])


def test_eight_gaussians_stand_on_a_circle() -> None:
    x = eight_gaussians(COUNT, generator())
    sector = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    assert chisquare(torch.bincount(sector, minlength=8)).pvalue > 1e-4
    angle = math.pi / 4 * sector
    away = x - RING_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    assert away.std(0).tolist() == pytest.approx([RING_STD] * 2, rel=0.02)
    variance = RING_RADIUS**2 / 2 + RING_STD**2
    check_moments(x, [[variance, 0.0], [0.0, variance]])


def test_the_noise_is_standard_normal() -> None:
    check_moments(normal(COUNT, generator()), [[1.0, 0.0], [0.0, 1.0]])


# ---------------------------------------------------------------- measures


class Known(nn.Module):
    """v(x, t) = scale · J x with a quarter turn J: circles at constant speed. Counts its evaluations."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.calls = scale, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * torch.stack([-x[:, 1], x[:, 0]], 1)


class Shift(nn.Module):
    """v(x, t) = (2, 0)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tensor([2.0, 0.0]).expand_as(x)


def test_evaluations_are_those_of_the_table(tmp_path: Path) -> None:
    run, field = make_run(tmp_path, evaluations=(1, 2, 3, 8)), Known(0.0)
    log_distances(run, MOONS, VARIANTS[0], 0, field)
    rows = run.rows("distance")
    assert [(row["solver"], row["evaluations"]) for row in rows] == [
        ("Euler", 1), ("Euler", 2), ("Euler", 3), ("Euler", 8), ("Heun", 2), ("Heun", 8),
    ]  # fmt: skip
    assert field.calls == sum(row["evaluations"] for row in rows)
    # The field 0 leaves the source where it is.
    exact = wasserstein2(*start_and_new(run, MOONS, 0, 0))
    assert [row["w2"] for row in rows] == pytest.approx([exact] * 6)


def test_a_perfect_flow_is_at_the_distance_of_new_data(tmp_path: Path) -> None:
    """Of normal data the field 0 is perfect, and one that moves by 2 is at √(floor² + 4), but for the draws."""
    run, seeds = make_run(tmp_path, repeats=8, samples=200), range(2)
    perfect = Problem("normal", normal, normal)
    for seed in seeds:
        log_floors(run, perfect, seed)
        log_repeats(run, perfect, VARIANTS[0], seed, Known(0.0))
        log_repeats(run, perfect, VARIANTS[1], seed, Shift())
    names = [variant.name for variant in VARIANTS[:2]]
    near, far = (over_floors(run, perfect, name) for name in names)
    assert near == pytest.approx([1.0, 1.0], abs=0.15)
    level = run.by_seed("floor", "w2", problem="normal")
    assert len(level) == 16
    assert far == pytest.approx([(1 + 4 / (sum(level) / 16) ** 2) ** 0.5] * 2, rel=0.15)


def test_half_a_turn_bends_as_in_closed_form(tmp_path: Path) -> None:
    """On a half circle of radius r: ∫|dx/dt|² = π²r², |x(1) - x(0)|² = 4r², and the bend is their difference."""
    run, variant = make_run(tmp_path, sections=200), VARIANTS[0]
    model_folder(run, CHECKERBOARD, variant, 0).mkdir(parents=True)
    log_trajectories(run, CHECKERBOARD, variant, 0, Known(math.pi))
    (row,) = run.rows("trajectories")
    start, _ = start_and_new(run, CHECKERBOARD, 0, 0)
    assert row["ratio"] == pytest.approx(math.pi**2 / 4 - 1, rel=1e-3)
    assert row["length"] == pytest.approx(4 * start.square().sum(1).mean().item(), rel=1e-3)
    kept = torch.load(measure.trajectory_file(run, CHECKERBOARD, variant, 0), weights_only=True)
    assert kept.shape == (201, run.config.shown, 2)
    torch.testing.assert_close(kept[-1], -start[: run.config.shown], rtol=1e-3, atol=1e-3)


def test_both_targets_have_the_same_mean_gradient_and_the_posterior_mean_less_variance(tmp_path: Path) -> None:
    run = make_run(tmp_path, minibatches=200)
    torch.manual_seed(0)
    field, data = Velocity(8), checkerboard(100, generator())
    (single, g_single), (stable, g_stable) = (sample_gradients(run, data, 0, field, target, None) for target in TARGETS)
    difference = g_stable - g_single
    error = difference.var(0).sum().sqrt() / len(difference) ** 0.5
    assert difference.mean(0).norm() < 3 * error
    assert error < 0.2 * g_single.mean(0).norm()
    assert g_stable.var(0).sum() < 0.8 * g_single.var(0).sum()
    assert stable.mean() < single.mean()  # by the variance of the target


def test_of_one_point_both_targets_are_the_same(tmp_path: Path) -> None:
    run, data = make_run(tmp_path), torch.tensor([[0.5, -1.0]]).expand(20, 2).contiguous()
    field = Velocity(8)
    single, stable = (sample_gradients(run, data, 0, field, target, 0.5) for target in TARGETS)
    assert single[0].shape == (run.config.minibatches, run.config.batch)
    torch.testing.assert_close(stable, single, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- claims


def test_standard_errors_and_signs_by_hand() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    assert with_error([1.0, 2.0, 3.0], ".2f") == "2.00 ± 0.58"
    assert with_error([1.0]) == "1.000"
    assert is_negative([-1.0]) is None
    assert is_negative([-1.0, -1.1]) is True
    assert is_negative([-3.0, -1.0]) is False  # -2 ± 1
    assert is_negative([1.0, 1.1]) is False
    assert [are_all(found) for found in ([True, True], [True, False], [True, None])] == [True, False, None]


@pytest.mark.parametrize(("second", "holds"), [((0.5, 0.6), True), ((0.5, 1.05), False)])
def test_a_variant_must_be_better_at_both_numbers_of_evaluations(
    tmp_path: Path, second: tuple[float, float], holds: bool
) -> None:
    run = make_run(tmp_path)
    for seed in (1, 0):  # values go by seed, not by order
        for name, values in ((INDEPENDENT, (2.0, 1.0)), (EXACT, (0.5, second[seed]))):
            key = {"problem": "moons", "variant": name, "seed": seed}
            for count, value in zip((1, 2), values, strict=True):
                run.log(kind="distance", **key, solver="Euler", evaluations=count, w2=value + 0.1 * seed)
            run.log(kind="trajectories", **key, ratio=values[0])
    straighter, closer = compare(run, MOONS, EXACT)
    assert straighter.passed is True
    assert straighter.ours == "-1.500 ± 0.000"
    assert closer.passed is holds
    assert closer.ours.startswith("-1.500 ± 0.000 / -")


# ---------------------------------------------------------------- training and runs


def test_variants_of_a_seed_share_weights_and_minibatches(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    losses = {variant.name: make_loss(run, CHECKERBOARD, variant, 0) for variant in VARIANTS}
    first = losses[INDEPENDENT].field.state_dict()
    for loss in losses.values():
        for name, value in loss.field.state_dict().items():
            assert torch.equal(value, first[name])
    other = make_loss(run, CHECKERBOARD, VARIANTS[0], 1).field.state_dict()
    assert not torch.equal(other["network.layers.0.weight"], first["network.layers.0.weight"])
    trainers = [make_trainer(run, CHECKERBOARD, variant, 0) for variant in VARIANTS[:4]]
    assert len({trainer.options for trainer in trainers}) == 1
    assert torch.equal(trainers[0].minibatches[3][0], trainers[3].minibatches[3][0])


def test_variants_differ_as_their_names_say(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert [variant.name for variant in variants(CHECKERBOARD)] == [variant.name for variant in VARIANTS]
    assert [variant.name for variant in VARIANTS if variant not in variants(MOONS)] == [
        "variance preserving", "stable target",
    ]  # fmt: skip
    by_name = {variant.name: make_loss(run, MOONS, variant, 0) for variant in variants(MOONS)}
    assert isinstance(by_name[EXACT].options.path, LinearPath)
    assert by_name[INDEPENDENT].coupling is None
    assert type(by_name[EXACT].coupling).__name__ == "ExactCoupling"
    assert by_name[RECTIFIED].paired
    assert by_name[RECTIFIED].source.points is None
    source = by_name[INDEPENDENT].source.points
    assert torch.minimum(*((sign * source - torch.tensor(MOON_CENTER)).norm(dim=1) for sign in (1, -1))).max() < 2.5
    stable = make_loss(run, CHECKERBOARD, VARIANTS[5], 0)
    assert stable.options.stable_target
    assert stable.refs.points.shape == (run.config.data, 2)
    assert stable.source.points is None


def test_rectified_pairs_are_those_of_the_independent_flow(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    pairs = training.make_pairs(run, MOONS, 0)
    assert pairs.shape == (run.config.data, 2, 2)
    assert torch.equal(pairs[:, 0], draw(run, moons, run.config.data, "start of pairs", "moons", 0))
    field = training.train(run, MOONS, VARIANTS[0], 0)
    x, steps = pairs[:, 0], 200
    with torch.no_grad():
        for step in range(steps):  # midpoints
            half = x + field(x, torch.tensor(step / steps)) / (2 * steps)
            x = x + field(half, torch.tensor((step + 0.5) / steps)) / steps
    torch.testing.assert_close(pairs[:, 1], x, rtol=1e-3, atol=1e-3)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    trained = [(s, p.name, v.name) for s in range(2) for p in PROBLEMS for v in variants(p)]
    assert [(row["seed"], row["problem"], row["variant"]) for row in finished.rows("trajectories")] == trained
    assert len(finished.rows("distance")) == len(trained) * (3 + 2)
    assert len(finished.rows("target")) == 2 * 2 * (1 + len(measure.TIMES))
    numbers = [v for row in finished.rows() for v in row.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    assert {path.stem for path in finished.figures} == {"distance", "trajectories", "gradient"}
    assert (finished.out / "figures" / "transport.gif").stat().st_size > 1000
    text = (finished.out / "summary.md").read_text()
    assert "checkerboard: W2 in 1 / 2 evaluations (Euler), rectified minus independent" in text
    assert "moons: W2 in 4 evaluations (Heun) over W2 of new data" in text
    assert "moons, Sinkhorn: W2 in 2, 4 evaluations (Heun)" in text
    assert f"checkerboard: variance of the gradient, {STABLE} / single sample" in text


def test_of_a_finished_run_nothing_is_trained_again(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_train_iteration")
    rows = copied.rows()
    main(copied)
    assert copied.rows() == rows


@pytest.mark.parametrize(
    ("kept", "last"),
    [
        (3, ("repeat", INDEPENDENT)),
        (12, ("target", None)),
        (68, ("distance", RECTIFIED)),
    ],
)
def test_a_run_that_was_interrupted_ends_as_it_would_have(copied: Run, kept: int, last: tuple[str, str | None]) -> None:
    """Killed within the rows of a training; the first rectified flow and those of the moons are not even trained."""
    metrics, rows = copied.out / "metrics.jsonl", copied.rows()
    assert (rows[kept - 1]["kind"], rows[kept - 1].get("variant")) == last
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:kept]))
    shutil.rmtree(model_folder(copied, CHECKERBOARD, VARIANTS[-1], 0))
    for folder in (copied.out / "models").glob("moons-*"):
        shutil.rmtree(folder)
    again = make_run(copied.out)
    main(again)
    assert again.rows() == rows


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema": 1.0}, "ema must be below 1"),
        ({"data": 8}, "data must be at least 32"),
        ({"evaluations": (1, 2, 5)}, r"the largest even, as Heun's method needs, got \(1, 2, 5\)"),
        ({"evaluations": (2,)}, "evaluations must be at least two numbers"),
        ({"evaluations": (0, 2)}, "evaluations must be above 0"),
        ({"minibatches": 1}, "minibatches must be at least 2"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
