"""Tests of the springs: the simulator against SciPy and its energy, the mask of the transformer, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from experiments.common.objectives import HORIZONS
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.springs import EXPERIMENT, simulator
from experiments.springs.experiment import main
from experiments.springs.results import least, relative_changes
from experiments.springs.simulator import trajectories, velocity
from experiments.springs.training import MODELS, OBJECTIVES, data, floor, make_trainer, samples_file
from fluxmatching import LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.networks import TrajectoryTransformer


def test_trajectories_are_those_of_scipy() -> None:
    found = trajectories(3, torch.Generator().manual_seed(1)).double()
    times = np.arange(simulator.LENGTH) * simulator.STEP_SIZE
    for trajectory in found:
        exact = solve_ivp(
            lambda _, y: velocity(torch.from_numpy(y)).numpy(),
            (0, times[-1]),
            trajectory[0].numpy(),
            t_eval=times,
            rtol=1e-10,
            atol=1e-10,
        )
        # The classical method at a step of 0.1: its own error is up to 10⁻³ for the stiffest starts.
        np.testing.assert_allclose(trajectory.numpy(), exact.y.T, atol=2e-3)


def test_energy_falls_as_damping_takes_it() -> None:
    """dE/dt = -γ (v1² + v2²), whatever the springs: checks every term of the forces."""
    state = torch.randn(100, 4, dtype=torch.float64, requires_grad=True)
    q1, v1, q2, v2 = state.unbind(-1)
    potential = simulator.WALL * (q1**2 + q2**2) / 2 + simulator.COUPLING * (q1 - q2) ** 2 / 2
    energy = (v1**2 + v2**2) / 2 + potential + simulator.CUBIC * (q1**4 + q2**4) / 4
    (gradient,) = torch.autograd.grad(energy.sum(), state)
    loss = -simulator.DAMPING * (v1**2 + v2**2)
    torch.testing.assert_close((gradient * velocity(state)).sum(-1), loss)


def test_initial_states_have_table_5s_spread() -> None:
    first = trajectories(20_000, torch.Generator().manual_seed(0), length=2)[:, 0]
    torch.testing.assert_close(first.std(0), torch.tensor([3.0, 1.5, 3.0, 1.5]), rtol=0.03, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_point_sees_later_points_only_without_the_mask(causal: bool) -> None:
    torch.manual_seed(0)
    network = TrajectoryTransformer(10, width=32, blocks=2, heads=4, causal=causal)
    x = torch.randn(2, 10, 4)
    changed = x.clone()
    changed[:, 6] += 1
    noise = torch.zeros(2)
    difference = (network(changed, noise) - network(x, noise)).abs().amax((0, 2))
    assert difference[6:].min() > 1e-4
    assert (difference[:6].max() < 1e-6) == causal


def test_equal_states_at_different_times_are_distinguished() -> None:
    torch.manual_seed(0)
    out = TrajectoryTransformer(10, width=32, blocks=1, heads=4)(torch.ones(1, 10, 4), torch.zeros(1))[0]
    assert (out[1:] - out[:-1]).norm(dim=1).min() > 1e-4


def test_size_of_the_papers_network() -> None:
    parameters = sum(p.numel() for p in TrajectoryTransformer().parameters())
    assert parameters == pytest.approx(38e6, rel=0.01)


def test_bad_width() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of 2 heads, got 20 and 8"):
        TrajectoryTransformer(width=20)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def test_models_of_a_seed_differ_in_mask_and_objective_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trainers = {model: make_trainer(run, *model, seed=0, iterations=4) for model in MODELS}
    first = trainers["flux", "full"].loss.state_dict()
    for one in trainers.values():
        for name, value in one.loss.named_parameters():
            assert torch.equal(value, first[name])
    blocks = {model: one.loss.get_submodule("field.network.blocks.0") for model, one in trainers.items()}
    assert {model: block.causal for model, block in blocks.items()} == {
        (objective, mask): mask == "causal" for objective, mask in MODELS
    }
    assert trainers["DSM", "full"].options == trainers["flux", "causal"].options


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_normalized_and_report_their_noise(tmp_path: Path, objective: str) -> None:
    run = make_run(tmp_path)
    loss, x = make_trainer(run, objective, "causal", seed=0, iterations=4).loss, data(run)[:8]
    value, logged = loss(x, seed=1)
    sigma = logged["sigma"]
    assert run.config.sigma_min <= sigma <= run.config.sigma_max
    with torch.no_grad():  # d/ds of ℓ e^-s + s is 1 - ℓ e^-s: a normalizer one higher changes the loss so
        loss.normalizer.layer.second.bias += 1.0
    higher, _ = loss(x, seed=1)
    scale = loss.normalizer.log_scale(sigma).item()
    torch.testing.assert_close(higher, (value - (scale - 1)) / np.e + scale, rtol=1e-4, atol=1e-4)


def test_every_fifth_point_of_the_same_trajectories(tmp_path: Path) -> None:
    run = make_run(tmp_path / "few", every=5)
    found = data(run)
    assert found.shape == (run.config.data, 10, 4)
    assert torch.equal(found, data(make_run(tmp_path / "all"))[:, ::5])
    assert make_trainer(run, "flux", "causal", seed=0, iterations=1).step().isfinite()
    assert floor(run)["w2"] > 0


def test_relative_changes_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for mask, found in (("full", (2.0, 4.0)), ("causal", (3.0, 3.0))):
        for seed, value in enumerate(found):
            run.log(kind="model", objective="flux", mask=mask, seed=1 - seed, iteration=4, w2=value)
            run.log(kind="model", objective="flux", mask=mask, seed=1 - seed, iteration=2, w2=1.0)
    assert relative_changes(run, "flux", 4) == pytest.approx([-0.25, 0.5])
    assert relative_changes(run, "flux", 2) == [0, 0]
    assert least(run, "flux", "causal") == [1, 1]
    run.log(kind="model", objective="DSM", mask="full", seed=0, iteration=2, w2=3.0)
    run.log(kind="model", objective="DSM", mask="full", seed=0, iteration=4, w2=2.0)
    assert least(run, "DSM", "full") == [2]


def test_every_horizon_trains(tmp_path: Path) -> None:
    kinds = {"learned": LearnedHorizon, "uniform": UniformHorizon, "exponential": TruncatedExponentialHorizon}
    assert set(kinds) == set(HORIZONS)
    for name, kind in kinds.items():
        run = make_run(tmp_path / name, horizon=name, tau_max=2.0)
        one = make_trainer(run, "flux", "full", seed=0, iterations=1)
        horizon = one.loss.get_submodule("horizon")
        assert type(horizon) is kind
        assert horizon.tau_max == 2
        assert one.step().isfinite()


def test_sizes_of_trained_fields(finished: Run) -> None:
    """An untrained field is EDM's skip connection, -z/(σ² + σ_data²), but for what its network adds."""
    rows = finished.rows("field size")
    assert len(rows) == 3 * len(MODELS)
    spread = data(finished).std().item()
    for row in rows:
        linear_part = row["sigma"] / (row["sigma"] ** 2 + spread**2) ** 0.5
        assert row["size"] > 0.5 * linear_part
        if row["sigma"] == 10.0:
            assert row["size"] == pytest.approx(linear_part, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"horizon": "none"}, "horizon must be one of learned, uniform, exponential, got 'none'"),
        ({"ema": 1.0}, "ema must be below 1"),
        ({"lr": np.inf}, "lr must be finite, got inf"),
        ({"sigma_min": 100.0}, "0 < sigma_min < sigma_max must hold, got 100.0 and 80.0"),
        ({"width": 18}, "width must be a multiple of 2 heads, got 18 and 2"),
        ({"evaluations": 9}, "evaluations must be at most iterations, got 9 and 4"),
        ({"data": 8}, "data must be at least 16"),
        ({"refs": 8}, "refs must be 0 .the minibatch. or from batch = 16 to data = 64, got 8"),
        ({"refs": 65}, "from batch = 16 to data = 64, got 65"),
        ({"sampler": "heun"}, "sampler must be one of reverse, ode, got 'heun'"),
        ({"dsm_label": "log"}, "dsm_label must be one of sigma, sigma2, got 'log'"),
        ({"every": 0}, "every must be above 0"),
        ({"every": 26}, "every must leave two points of 50, so be at most 25, got 26"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert [(row["objective"], row["mask"]) for row in finished.rows("model")] == [m for m in MODELS for _ in range(2)]
    assert [row["iteration"] for row in finished.rows("model")] == [2, 4] * len(MODELS)
    assert all(row["w2"] > 0 for row in finished.rows("model"))
    assert {path.stem for path in finished.figures} == {"mask", "linear", "line", "trajectories"}
    assert (finished.out / "figures" / "masses.gif").stat().st_size > 1000
    text = (finished.out / "summary.md").read_text()
    assert "change of W2 by the mask after 2, 4 iterations: flux" in text
    assert "change of W2 by the mask, of the least evaluation: DSM" in text
    assert "own label" not in text
    assert len(finished.rows("line")) == 8
    assert "linear fields in 72 steps: W2 under the mask, score matching over Flux Matching" in text


def test_of_a_finished_run_nothing_is_trained_again(copied: Run) -> None:
    rows = copied.rows()
    main(copied)
    assert copied.rows() == rows


@pytest.mark.parametrize("kept", [20, 64, -1])
def test_a_run_that_lost_its_last_rows_ends_as_it_would_have(copied: Run, kept: int) -> None:
    """Killed within the linear fields, between a checkpoint and its row, and at the end."""
    metrics = copied.out / "metrics.jsonl"
    lines, rows = metrics.read_text().splitlines(keepends=True), copied.rows("model") + copied.rows("linear size")
    metrics.write_text("".join(lines[:kept]))
    lost = {(row["objective"], row["mask"], row["seed"]) for row in rows if row["kind"] == "model"} - {
        (row["objective"], row["mask"], row["seed"]) for row in make_run(copied.out).rows("model")
    }
    for objective, mask, seed in lost:  # of these not even the first stage is known
        shutil.rmtree(samples_file(copied, objective, mask, seed).parent)
    again = make_run(copied.out)
    main(again)
    assert again.rows("model") + again.rows("linear size") == rows


def test_a_model_ahead_of_its_rows_is_reported(copied: Run) -> None:
    metrics = copied.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["kind"] != "model"))
    with pytest.raises(UsageError, match="is trained beyond iteration 2, which was not logged: delete it"):
        main(make_run(copied.out))
