"""Checks of critic: derivatives, exact gradients and laws against closed forms, estimators, and a repeated run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import solve_sylvester
from torch import Tensor

from experiments.common.mixture import GaussianMixture
from experiments.common.rotation import quarter_turn
from experiments.common.run import Run
from experiments.critic.critic import Critic, critic_loss, draw_directions
from experiments.critic.experiment import EXPERIMENT, main
from experiments.critic.measure import describe, flat_gradient
from experiments.critic.methods import (
    CRITIC,
    CRITIC_NOISE,
    CRITIC_SCORE,
    CROSS,
    METHODS,
    Chains,
    ControlVariate,
    CriticMethod,
    LearnedTarget,
    Sizes,
    make_method,
)
from experiments.critic.problems import (
    MIXTURE,
    NAMES,
    SPRINGS,
    MixtureProblem,
    Problem,
    SpringsProblem,
    make_problem,
    noised,
)
from experiments.critic.stationary import bernoulli, energy_distance, stationary_law
from experiments.springs.linear import flux_matrix, score_matrix

AXES = torch.eye(3, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def problem_of(name: str) -> Problem:
    return make_problem(name, cells=60, chains=20, chain_steps=2)


def make_critic(dim: int, width: int = 8) -> Critic:
    torch.manual_seed(0)
    return Critic(dim, width, 2, 1.7).double()


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


# ---------------------------------------------------------------- critic


def test_derivatives_of_the_critic_are_those_of_automatic_differentiation() -> None:
    critic, x, own = make_critic(3), normal(5, 3), normal(5, 2, 3, seed=1)

    def value(z: Tensor) -> Tensor:
        return critic(z[None])[0]

    gradient = torch.func.vmap(torch.func.grad(value))(x)
    hessian = torch.func.vmap(torch.func.hessian(value))(x)
    slopes, curvature = critic.derivatives(x, AXES)
    torch.testing.assert_close(slopes, gradient)
    torch.testing.assert_close(critic.gradient(x), gradient)
    torch.testing.assert_close(curvature, hessian.diagonal(dim1=1, dim2=2).sum(1))
    slopes, curvature = critic.derivatives(x, own)
    torch.testing.assert_close(slopes, (own @ gradient[:, :, None])[..., 0])
    torch.testing.assert_close(curvature, torch.einsum("nki,nij,nkj->n", own, hessian, own))


def test_random_directions_have_the_loss_of_the_axes_in_the_mean() -> None:
    critic, x, drift = make_critic(3), normal(4, 3), normal(4, 3, seed=2)
    exact = critic_loss(critic, x, drift, draw_directions(x, 0, generator()), by_parts=True)
    many = [tensor.repeat(20_000, 1) for tensor in (x, drift)]
    found = critic_loss(critic, *many, draw_directions(many[0], 2, generator(3)), by_parts=True)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)


def test_all_forms_of_the_critic_have_the_same_mean_loss() -> None:
    problem = problem_of(MIXTURE)
    torch.manual_seed(0)
    field, sizes = problem.make_field(), Sizes(batch=100_000, backend="torch")
    critic, losses = Critic(2, 8, 2, 1.0), list[float]()
    for parameter in critic.parameters():
        parameter.data *= 4
    for name in (CRITIC, CRITIC_NOISE, CRITIC_SCORE):
        method = make_method(name, problem, sizes, 0.0)
        assert isinstance(method, CriticMethod)
        x, drift = method.drift(field, generator(1))
        losses.append(critic_loss(critic, x, drift, torch.eye(2), by_parts=name == CRITIC).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=0.03)
    assert abs(losses[0]) > 0.1


def test_a_critic_finds_the_gradient_part_and_a_copy_of_it_leaves_it_alone() -> None:
    problem = problem_of(MIXTURE)
    torch.manual_seed(0)
    method = make_method(CRITIC, problem, Sizes(batch=256, width=32), 0.01)
    assert isinstance(method, CriticMethod)
    assert isinstance(problem, MixtureProblem)

    def field(x: Tensor) -> Tensor:  # ∇x₁ added, and a swirl that keeps p
        score = problem.mixture.score(x)
        return score + x.new_tensor([1.0, 0.0]) + quarter_turn(score)

    draws = generator(2)
    for _ in range(150):
        method.adapt(field, draws)
    x, _ = noised(problem, 1000, generator(3))
    error = (method.values(x) - x.new_tensor([1.0, 0.0])).square().sum(1).mean().sqrt()
    assert error < 0.35
    before = method.values(x)
    other = method.duplicate()
    other.adapt(field, draws)
    assert torch.equal(method.values(x), before)
    assert not torch.equal(other.values(x), before)


# ---------------------------------------------------------------- exact answers


def test_grid_projection_keeps_gradients_and_drops_what_preserves_the_density() -> None:
    problem = make_problem(MIXTURE, cells=150, chains=1, chain_steps=1)
    assert isinstance(problem, MixtureProblem)
    exact = GaussianMixture(problem.mixture.means.double(), problem.mixture.variance)

    def gradient(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0].cos() * (x[:, 1] / 2).cos(), -x[:, 0].sin() * (x[:, 1] / 2).sin() / 2], 1)

    def field(x: Tensor) -> Tensor:
        score = exact.score(x.double())
        return score + gradient(x.double()) + quarter_turn(score)

    grid = problem.grid
    across = grid.along_faces(field) - grid.along_faces(problem.mixture.score)
    part = grid.gradient_part(across)
    wanted = grid.along_faces(gradient)
    assert grid.mean_product(part - wanted, part - wanted) < 2e-5 * grid.mean_product(wanted, wanted)
    sample = exact.sample(200_000, generator())
    mean = gradient(sample).square().sum(1).mean().item()
    assert problem.exact_loss(field)[1] == pytest.approx(problem.sigma**2 * mean, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_exact_gradients_are_the_slopes_of_the_exact_loss(name: str) -> None:
    problem = problem_of(name)
    torch.manual_seed(0)
    field = problem.make_field()
    field.double() if name == SPRINGS else field
    gradient = flat_gradient(field, problem.exact_loss(field)[0])
    direction, step = gradient / gradient.norm(), 1e-2
    values = []
    for sign in (-1, 1):
        moved, place = problem.make_field().to(next(field.parameters()).dtype), 0
        moved.load_state_dict(field.state_dict())
        for parameter in moved.parameters():
            part = direction[place : place + parameter.numel()].reshape(parameter.shape)
            parameter.data += sign * step * part.to(parameter.dtype)
            place += parameter.numel()
        values.append(problem.exact_loss(moved)[1])
    assert (values[1] - values[0]) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.01)


def test_gradient_part_of_a_linear_field_gives_the_exact_gradient_for_springs() -> None:
    """The gradient part of f - s is B x with symmetric B and BΣ + ΣB = 2I - AΣ - ΣAᵀ."""
    problem = SpringsProblem()
    torch.manual_seed(0)
    field, covariance = problem.make_field(), problem.covariance
    matrix = field(torch.eye(problem.dim, dtype=torch.float64)).detach().T
    moved = matrix @ covariance + covariance @ matrix.T + 2 * torch.eye(problem.dim)
    part = torch.from_numpy(solve_sylvester(covariance.numpy(), covariance.numpy(), moved.numpy()))
    loss, value = problem.exact_loss(field)
    assert value == pytest.approx(problem.sigma**2 * (part @ covariance @ part).trace().item(), rel=1e-6)
    exact = flat_gradient(field, loss)
    paired = flat_gradient(field, problem.paired(field, lambda x: x @ part.to(x)))
    assert (paired - exact).norm() < 0.05 * exact.norm()


def test_distances_are_zero_for_fields_that_keep_the_law_and_positive_for_others() -> None:
    springs, mixture = SpringsProblem(), make_problem(MIXTURE, cells=100, chains=1, chain_steps=1)
    assert isinstance(mixture, MixtureProblem)
    for matrix in (score_matrix(springs.covariance, 4), flux_matrix(springs.covariance, 4)):
        assert springs.distance(lambda x, matrix=matrix: -x @ matrix.T.to(x)) < 1e-4
    assert springs.distance(springs.make_field()) > 1
    assert springs.distance(lambda x: x) == math.inf

    def swirl(x: Tensor) -> Tensor:
        score = mixture.mixture.score(x)
        return score + quarter_turn(score)

    assert abs(mixture.distance(swirl)) < 1e-5
    assert mixture.distance(lambda x: mixture.mixture.score(x) + x.new_tensor([0.5, 0.0])) > 0.01


def test_stationary_law_of_a_linear_field_is_gaussian() -> None:
    """f = -x/v + c keeps N(v c, v I); a turn J x about that point changes nothing."""
    center, variance = torch.tensor([0.4, -0.2]), 0.7

    def field(x: Tensor) -> Tensor:
        return (center - x) / variance + quarter_turn(x - center)

    law, places = stationary_law(field, 5.0, 80)
    mean = law.flatten() @ places.double()
    spread = law.flatten() @ (places.double() - mean).square()
    torch.testing.assert_close(mean, center.double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(spread, torch.full((2,), variance).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(bernoulli(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 1 / (math.e - 1)]))


def test_energy_distance_by_loops() -> None:
    p, q = (normal(3, 3, seed=seed).square() for seed in (1, 2))
    p, q = p / p.sum(), q / q.sum()
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double() * 0.5
    lengths = torch.cdist(cells, cells)
    a, b = p.flatten(), q.flatten()
    assert energy_distance(p, q, 0.5) == pytest.approx((2 * a @ lengths @ b - a @ lengths @ a - b @ lengths @ b).item())


# ---------------------------------------------------------------- estimators


def test_control_variate_does_not_move_the_mean() -> None:
    problem = problem_of(MIXTURE)
    torch.manual_seed(0)
    field, sizes = problem.make_field(), Sizes(batch=2000, backend="torch")
    learned = LearnedTarget(problem, sizes, 0.01)
    plain, control = Chains(problem, sizes, CROSS), ControlVariate(learned)
    draws = [generator(seed) for seed in (1, 1)]
    found = [
        torch.stack([flat_gradient(field, method.loss(field, draw)) for _ in range(4)]).mean(0)
        for method, draw in zip((plain, control), draws, strict=True)
    ]
    without = flat_gradient(field, problem.paired(field, learned.values))
    assert (found[0] - found[1]).norm() < 0.35 * without.norm()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_gives_a_gradient_and_learns(name: str) -> None:
    problem, sizes = problem_of(name), Sizes(batch=64, width=8, features=8, probes=2, refs=70)
    torch.manual_seed(0)
    field = problem.make_field()
    for method in (make_method(method, problem, sizes, 0.01) for method in METHODS):
        for _ in range(2):
            method.adapt(field, generator(1))
            assert flat_gradient(field, method.loss(field, generator(2))).isfinite().all()


def test_description_of_gradients_with_known_mean_and_noise() -> None:
    truth = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    mean = torch.tensor([3.0, 1.0, 4.0, 0.0], dtype=torch.float64)
    samples = mean + 2 * normal(40_000, 4)
    for found in (describe(samples, truth), describe(samples, truth, mean)):
        assert found["error"] == pytest.approx(1 / 5, abs=0.02)
        assert found["cosine"] == pytest.approx(5 / math.sqrt(26), abs=0.01)
        assert found["snr"] == pytest.approx(25 / 16, abs=0.05)
    assert describe(samples, None)["snr"] == pytest.approx(26 / 16, abs=0.05)
    few = describe(1e-3 * truth + normal(8, 4), truth)
    assert -1 <= few["cosine"] <= 1


# ---------------------------------------------------------------- runs


def test_smoke_run_and_its_summary(finished: Run) -> None:
    finals = finished.rows("final")
    assert [(row["problem"], row["method"]) for row in finals] == [
        (name, method) for name in NAMES for method in METHODS
    ]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["distance"]) for row in finals)
    assert {row["stage"] for row in finished.rows("estimate")} == set(finished.config.stages)
    assert {path.stem for path in finished.figures} == {"estimates", "steps", "curves"}
    assert "criterion: at most 0.3" in (finished.out / "summary.md").read_text()


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 20}, "batch must be at least 48, got 20"),
        ({"stages": (5, 2)}, "stages must increase"),
        ({"probes": -1}, "probes must be at least 0, got -1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
