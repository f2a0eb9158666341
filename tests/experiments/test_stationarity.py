"""Checks of stationarity against cases with exact answers, exact resuming, and the smoke run."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.run import Run
from experiments.stationarity import experiment as stationarity
from experiments.stationarity.checks import (
    Bins,
    CurrentEstimator,
    causal_solution,
    field_current,
    jacobian,
    residual,
    root_mean_square,
    skewness,
    total_variation,
)
from experiments.stationarity.rollout import roll_out
from experiments.stationarity.training import CausalField, make_field, make_trainer, train
from fluxmatching import Trainer, unadjusted_langevin

TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
SIGMA = math.sqrt(0.4)
NORMAL = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0)
MIXTURE = GaussianMixture(triangle_means(1.8), 0.625)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotating(x: Tensor, speed: float = 1.0) -> Tensor:
    """Ornstein-Uhlenbeck with rotation: keeps N(0, I), with the current p · speed · (-x_2, x_1)."""
    return -x + speed * x @ TURN.T.to(x)


# ---------------------------------------------------------------- histograms


def test_histogram_by_hand() -> None:
    bins = Bins(limit=1.0, count=2)
    x = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [-0.5, 0.9], [0.0, 0.0], [1.0, 0.0], [0.2, -1.5]])
    # Edges belong to the bin above them, so the last two points are outside.
    assert bins.histogram(x).tolist() == pytest.approx([1 / 6, 2 / 6, 0, 1 / 6, 2 / 6])
    assert bins.centers().tolist() == [-0.5, 0.5]


def test_total_variation_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.25, 0.4, 0.2, 0.15])
    assert total_variation(p, q) == pytest.approx(0.25)
    assert total_variation(p, p) == 0
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1


def test_bin_probabilities_are_exact() -> None:
    one = Bins(limit=1.0, count=1).probabilities(NORMAL)
    inside = math.erf(1 / math.sqrt(2)) ** 2
    assert one.tolist() == pytest.approx([inside, 1 - inside])
    bins = Bins(limit=5.0, count=25)
    exact = bins.probabilities(MIXTURE)
    assert exact.sum().item() == pytest.approx(1)
    # x_1 goes with the first index: the bins around (0, 2), near the top mode, and (0, -2), near none.
    square = exact[:-1].reshape(25, 25)
    assert square[12, 17] > 3 * square[12, 7]
    assert square[12, 17] > 1.5 * square[17, 12]
    n = 40_000
    sampled = bins.histogram(MIXTURE.sample(n, generator()))
    assert ((sampled - exact).abs() < 5 * (exact / n).sqrt() + 5 / n).all()


# ---------------------------------------------------------------- probability current


@pytest.mark.parametrize("speed", [0.0, 2.0])
def test_current_of_a_rotating_ornstein_uhlenbeck_process(speed: float) -> None:
    bins, step = Bins(limit=2.0, count=8), 0.02
    field = functools.partial(rotating, speed=speed)
    # In discrete time x ← A x + √(2η) ξ, A = (1 - η) I + η ω J, keeps N(0, v I); E[x_{t±1} | x_t] is A x_t and Aᵀ x_t.
    stationary = GaussianMixture(NORMAL.means, 1 / (1 - step * (1 + speed**2) / 2))
    path = [stationary.sample(20_000, generator())]
    estimator = CurrentEstimator(bins, step)
    unadjusted_langevin(
        field, path[0], step_size=step, num_steps=60, generator=generator(1), callback=lambda _, x: path.append(x)
    )
    for before, now, after in zip(path, path[1:], path[2:], strict=False):
        estimator.add(before, now, after)
    centers = torch.cartesian_prod(bins.centers(), bins.centers()).reshape(8, 8, 2)
    density = stationary.log_density(centers).exp()
    assert (estimator.density() - density).abs().max() < 0.03 * density.max()
    expected = speed * density.unsqueeze(-1) * (centers @ TURN.T)
    # A displacement over 2 steps has the variance 4 · step, so the velocity's is 1 / step.
    visits = estimator.visits[:-1].reshape(8, 8, 1)
    noise = density.unsqueeze(-1) / (step * visits).sqrt()
    assert ((estimator.current() - expected).abs() < 5 * noise + 0.03 * expected.abs().max()).all()
    if speed:
        assert noise.max() < 0.1 * expected.abs().max()


def test_current_of_a_field_is_density_times_excess_over_the_score() -> None:
    bins = Bins(limit=2.0, count=4)
    found = field_current(functools.partial(rotating, speed=3.0), NORMAL, bins, fine=200)
    # Over [0, 1]² the mean of p x_2 is that of a product of one-dimensional integrals.
    by_x2 = (1 - math.exp(-0.5)) / math.sqrt(2 * math.pi) * 0.5 * math.erf(1 / math.sqrt(2))
    assert found[2, 2].tolist() == pytest.approx([-3 * by_x2, 3 * by_x2], rel=1e-4)
    assert field_current(NORMAL.score, NORMAL, bins).abs().max() == 0


# ---------------------------------------------------------------- Jacobian and residual


def test_skewness_by_hand() -> None:
    matrix = torch.tensor([[-1.0, -2.0], [4.0, 1.0]])
    x = torch.randn(7, 2)
    found = jacobian(lambda z: z @ matrix.T, x)
    torch.testing.assert_close(found, matrix.expand(7, 2, 2))
    # Antisymmetric part ±3, symmetric part diag(-1, 1) with 1 beside it.
    assert skewness(found) == pytest.approx(math.sqrt(18 / 4))
    assert skewness(jacobian(MIXTURE.score, x.double())) < 1e-12


def test_residual_by_hand() -> None:
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator())
    assert residual(rotating, NORMAL, x).abs().max() < 1e-12
    # f = -2x: u = -x, ∇·u + u·s = |x|² - 2.
    torch.testing.assert_close(residual(lambda z: -2 * z, NORMAL, x), x.square().sum(-1) - 2)
    assert root_mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(math.sqrt(12.5))
    assert root_mean_square(torch.tensor([1.0, -7.0])) == pytest.approx(5)


def test_causal_solution_is_causal_and_leaves_the_mixture_in_place() -> None:
    x = torch.cat([MIXTURE.sample(300, generator()), torch.tensor([[4.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)])
    field = functools.partial(causal_solution, MIXTURE)
    matrices = jacobian(field, x)
    assert matrices[:, 0, 1].abs().max() == 0
    assert matrices[:, 1, 0].abs().max() > 1
    assert residual(field, MIXTURE, x).abs().max() < 1e-8

    def best_of_score_matching(z: Tensor) -> Tensor:
        """E[s_1 | x_1] and s_2: causal as well, but without the way back along x_2."""
        return torch.cat([causal_solution(MIXTURE, z)[:, :1], MIXTURE.score(z)[:, 1:]], dim=-1)

    assert root_mean_square(residual(best_of_score_matching, MIXTURE, x)) > 0.5


def test_causal_solution_of_independent_coordinates_is_the_score() -> None:
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(causal_solution(NORMAL, x), NORMAL.score(x))


# ---------------------------------------------------------------- training and rollout


def make_run(out: Path, **overrides: Any) -> Run:
    experiment = stationarity.EXPERIMENT
    config = dataclasses.replace(experiment.presets["smoke"], **overrides)
    return Run(experiment, "smoke", config, "torch", torch.device("cpu"), 0, out, progress=False)


def test_field_is_causal_and_pulls_back_from_far_away(tmp_path: Path) -> None:
    _, data = stationarity.make_target(run := make_run(tmp_path))
    trainer = make_trainer(run, "flux", data, SIGMA)
    x = torch.randn(9, 2)
    variance = data.var(0).mean() + 0.4
    field = trainer.loss.get_submodule("field")
    torch.testing.assert_close(field(x), -x / variance)  # the networks' outputs start at zero
    trainer.step()
    trainer.step()
    matrices = jacobian(field, x)
    assert matrices[:, 0, 1].abs().max() == 0
    assert matrices[:, 1, 0].abs().min() > 0
    wild = CausalField(16, 2.0)
    for parameter in wild.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    far = 1000 * torch.nn.functional.normalize(torch.randn(99, 2), dim=-1)
    assert ((wild(far) * far).sum(-1) < 0).all()


def test_flux_matching_turns_the_causal_field_toward_the_solution(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=300, batch=128, log_every=300, learning_rate=0.01, hidden=32, data=5000)
    mixture, data = stationarity.make_target(run)
    x = mixture.sample(2000, generator())
    solution = causal_solution(mixture, x)

    def error(field: Any) -> float:
        return root_mean_square(field(x) - solution) / root_mean_square(solution)

    before = error(make_field(run, data, SIGMA))
    trained = make_trainer(run, "flux", data, SIGMA)
    for _ in range(300):
        trained.step()
    with torch.no_grad():
        assert error(trained.loss.get_submodule("field")) < 0.75 * before


def test_learning_rate_falls_along_a_cosine(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4, log_every=4, batch=16, data=100)
    _, data = stationarity.make_target(run)
    trainer = make_trainer(run, "dsm", data, SIGMA)
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"] / run.config.learning_rate)
    assert rates == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


class KilledError(Exception):
    """Stand-in for the end of the process."""


def kill_after(run: Run, saves: int) -> None:
    """Let `run` end in `KilledError` right after its n-th checkpoint."""
    save, count = run.save_state, [0]

    def counted(state: dict[str, Any]) -> None:
        save(state)
        count[0] += 1
        if count[0] == saves:
            raise KilledError

    run.save_state = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("objective", ["flux", "dsm"])
def test_resumed_training_equals_uninterrupted_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    sizes = {"steps": 7, "log_every": 2, "batch": 16, "data": 100}

    def go(run: Run) -> dict[str, Tensor]:
        _, data = stationarity.make_target(run)
        return train(run, objective, data, SIGMA).state_dict()

    whole = go(make_run(tmp_path / "whole", **sizes))
    save, saves = Trainer.save, []

    def counted(trainer: Trainer) -> None:
        save(trainer)
        saves.append(trainer.iteration)
        if len(saves) == 2:
            raise KilledError

    monkeypatch.setattr(Trainer, "save", counted)
    with pytest.raises(KilledError):
        go(make_run(tmp_path / "parts", **sizes))
    monkeypatch.undo()
    assert saves == [2, 4]
    torch.manual_seed(99)  # the resumed process has another global state
    parts = go(make_run(tmp_path / "parts", **sizes))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_resumed_rollout_equals_uninterrupted_rollout(tmp_path: Path) -> None:
    bins = Bins(limit=4.0, count=8)

    def go(run: Run) -> tuple[Tensor, Tensor]:
        found = roll_out(run, run.load_state() or {}, "rotating", rotating, NORMAL, bins, (3.0, 3.0))
        return found.histograms, found.current.current()

    whole = go(make_run(tmp_path / "whole"))
    killed = make_run(tmp_path / "parts")
    kill_after(killed, 3)
    with pytest.raises(KilledError):
        go(killed)
    parts = go(make_run(tmp_path / "parts"))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_rollout_of_a_preserving_field_reaches_the_target_and_another_does_not(tmp_path: Path) -> None:
    bins = Bins(limit=4.0, count=8)
    sizes = {"chains": 4000, "segment": 100, "segments": 5}
    run = make_run(tmp_path, **sizes)
    target = bins.probabilities(NORMAL)
    exact = total_variation(bins.histogram(NORMAL.sample(4000, generator())), target)
    right = roll_out(run, {}, "right", rotating, NORMAL, bins, (3.0, 3.0))
    wrong = roll_out(run, {}, "wrong", lambda x: -2 * x, NORMAL, bins, (3.0, 3.0))
    assert right.times == pytest.approx([0, 2, 4, 6, 8, 10])
    assert right.at(0.4)[:-1].reshape(8, 8)[7, 7] == 1
    assert total_variation(right.at(10), target) < 2 * exact
    assert total_variation(wrong.at(10), target) > 4 * exact
    logged = [row["total_variation"] for row in run.rows("distance") if row["field"] == "wrong"]
    assert logged[-1] == pytest.approx(total_variation(wrong.at(10), target))


def test_smoke_run_writes_rows_figures_and_summary(finished: Run) -> None:
    assert [(row["objective"], row["step"]) for row in finished.rows("train")] == [
        ("flux", 20), ("flux", 40), ("dsm", 20), ("dsm", 40),
    ]  # fmt: skip
    assert len(finished.rows("distance")) == 4 * finished.config.segments
    assert len(finished.rows("exact sample")) == 16
    measured = {row["field"]: row for row in finished.rows("field")}
    assert measured["score"]["skewness"] < 1e-5
    assert measured["causal"]["error"] == 0
    assert measured["causal"]["residual"] < 1e-2 * measured["untrained"]["residual"]
    for name in ("histograms", "distance", "current", "residual"):
        assert (finished.out / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    stationarity.main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


def test_unknown_objective_and_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flux, dsm"):
        make_trainer(make_run(tmp_path), "score", torch.zeros(100, 2), SIGMA)
    with pytest.raises(ValueError, match="segments must be at least 2, got 1"):
        stationarity.Config(segments=1)
    with pytest.raises(ValueError, match="step_size"):
        stationarity.Config(step_size=0.0)
