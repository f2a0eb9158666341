"""Checks of augment: exact fields, schedules and chains against closed forms, and a repeated run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

from experiments.augment import chains, experiment, problems, results
from experiments.augment.chains import CHEBYSHEV, CONSTANT, CYCLIC, Cost, Schedule, chebyshev, cyclic
from experiments.augment.experiment import EXPERIMENT, main
from experiments.augment.fields import LearnedField, StreamField, TurnedScore
from experiments.augment.measure import TURNS, circulating, kinds
from experiments.augment.problems import MixtureProblem, make_mixture
from experiments.augment.training import energy_distance
from experiments.common.mixture import GaussianMixture
from experiments.common.run import Run

EYE = torch.eye(2, dtype=torch.float64)
TURN = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


# ---------------------------------------------------------------- fields and problems


@pytest.mark.parametrize("dim", [2, 5])
def test_exact_fields_keep_the_density_and_the_free_one_does_not(dim: int) -> None:
    """∇·(p v)/p by automatic differentiation, for parameters far from their start."""
    mixture = GaussianMixture(torch.randn(3, dim, dtype=torch.float64, generator=generator()), 0.5)
    x = mixture.sample(40, generator(1)).requires_grad_()
    p = mixture.log_density(x).exp().detach()

    def outflow(v: nn.Module) -> Tensor:
        flow = mixture.log_density(x).exp()[:, None] * v.double()(x)
        slopes = [torch.autograd.grad(flow[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(dim)]
        return torch.stack(slopes).sum(0) / p

    torch.manual_seed(0)
    stream = StreamField(mixture.score, dim, 1.0, 3, 8)
    with torch.no_grad():
        stream.weights.normal_()
    for v in (stream, TurnedScore(mixture.score, dim)):
        assert v.double()(x).abs().max() > 0.5
        assert outflow(v).abs().max() < 1e-11
    assert outflow(LearnedField(mixture.score, dim, 1.0, 8)).abs().max() > 1e-2


@pytest.mark.parametrize("name", [problems.plane(0.4), problems.WIDE])
def test_bias_of_exact_samples_is_noise_and_that_of_others_is_not(name: str) -> None:
    problem = make_mixture(name)
    exact = problem.mixture.sample(40_000, generator()).reshape(100, 400, -1)
    assert problem.bias(exact) < 0.004
    assert problem.errors(exact).abs().max() < 0.015
    wider = GaussianMixture(problem.mixture.means, 1.2 * problem.mixture.variance)
    assert problem.bias(wider.sample(40_000, generator()).reshape(100, 400, -1)) > 0.009


def test_means_of_the_mixtures() -> None:
    wide = make_mixture(problems.WIDE).mixture.means
    torch.testing.assert_close(wide.norm(dim=1), torch.full((5,), problems.RADIUS))
    assert torch.pdist(wide).std() < 1e-5
    variances = problems.gaussian_variances(16, 100.0)
    assert variances[0] / variances[-1] == pytest.approx(100)


# ---------------------------------------------------------------- schedules and chains


@pytest.mark.parametrize("steps", [2, 5])
def test_chebyshev_steps_contract_as_much_as_possible(steps: int) -> None:
    """max |Π (1 - λ h_k)| over precisions λ in [1/κ, 1] is 1/T_K((κ + 1)/(κ - 1))."""
    ratio = 12.0
    sizes = torch.tensor(chebyshev(1.0, ratio, steps).sizes, dtype=torch.float64)
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    node = (1 + 1 / ratio) / 2 + (1 - 1 / ratio) / 2 * math.cos(math.pi / (2 * steps))
    precisions = torch.linspace(1 / ratio, 1, 2001, dtype=torch.float64)
    found = (1 - precisions[:, None] * sizes / node).prod(1).abs().max().item()
    assert found == pytest.approx(1 / math.cosh(steps * math.acosh((ratio + 1) / (ratio - 1))), rel=1e-6)


def test_cyclic_steps_fall_by_equal_factors() -> None:
    assert cyclic(2.0, 0.25, 4).sizes == pytest.approx((2.0, 1.0, 0.5, 0.25))


@pytest.mark.parametrize("h", [0.1, 1.0, 1.7])
def test_cost_of_constant_steps_in_one_dimension(h: float) -> None:
    """x ← (1 - h) x + √(2h) ξ has variance 1/(1 - h/2) and an autocorrelation time of (2 - h)/h."""
    one = torch.ones(1, dtype=torch.float64)
    found = chains.measure_gaussian(-one[None], one, [Schedule(CONSTANT, (h,)), Schedule(CONSTANT, (2.5,))])
    (cost,) = found.values()  # 2.5 is unstable
    assert cost.evaluations == pytest.approx(max(1, (2 - h) / h), rel=1e-9)
    assert cost.bias == pytest.approx(h / 2 / (1 - h / 2), rel=1e-9)


def test_stationary_covariance_is_that_of_scipy() -> None:
    product = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=generator())
    noise = torch.diag(torch.tensor([1.0, 2.0, 0.5, 0.1], dtype=torch.float64))
    wanted = torch.from_numpy(solve_discrete_lyapunov(product.numpy(), noise.numpy()))
    torch.testing.assert_close(chains.stationary_covariance(product, noise), wanted)


@pytest.mark.parametrize("schedule", [Schedule(CONSTANT, (0.3,)), cyclic(0.3, 0.05, 3)])
def test_simulated_chains_cost_what_the_closed_form_says(schedule: Schedule) -> None:
    """One component makes the mixture a Gaussian, and f = -(1 + J) x/ν² there is linear."""
    mixture = GaussianMixture(torch.zeros(1, 2), 0.7)
    frequencies = torch.tensor([[1.0, 0.0], [0.0, 1.5]])
    truth = torch.exp(-0.35 * frequencies.square().sum(1))
    problem = MixtureProblem(mixture, 0.7, frequencies, torch.zeros(2), truth)
    matrix = -(EYE + TURN) / 0.7
    (cost,) = chains.measure_gaussian(matrix, torch.full((2,), 0.7, dtype=torch.float64), [schedule]).values()
    found = chains.measure_mixture(lambda x: x @ matrix.float().T, problem, [schedule], 900, 400, 3)[schedule]
    assert found.evaluations == pytest.approx(cost.evaluations, rel=0.1)
    # A covariance (1 + δ) ν² changes the mean of cos(w·x) by the factor exp(-|w|² δ ν²/2).
    delta = cost.bias if schedule.kind == CONSTANT else None
    if delta is not None:
        wanted = (truth * (torch.exp(-0.35 * delta * frequencies.square().sum(1)) - 1)).square().mean().sqrt()
        assert found.bias == pytest.approx(wanted.item(), rel=0.2)


def test_diverging_and_short_chains_are_left_out() -> None:
    problem = make_mixture(problems.plane(0.7))
    diverging, short = Schedule(CONSTANT, (3.0,)), Schedule(CONSTANT, (0.001,))
    assert chains.measure_mixture(problem.mixture.score, problem, [diverging, short], 400, 4, 0) == {}


def test_best_schedules_are_those_that_no_other_of_their_kind_beats() -> None:
    a, b, c, d = (Schedule(CONSTANT, (h,)) for h in (0.1, 0.2, 0.3, 0.4))
    e = Schedule(CYCLIC, (1.0, 0.1))
    costs = {a: Cost(9.0, 0.1), b: Cost(5.0, 0.2), c: Cost(7.0, 0.3), d: Cost(2.0, 0.4), e: Cost(8.0, 0.5)}
    assert set(chains.best(costs)) == {a, b, d, e}


def test_energy_distance_by_loops() -> None:
    x, y = torch.randn(5, 2, generator=generator()), torch.randn(4, 2, generator=generator(1)) + 1
    between = sum((a - b).norm() for a in x for b in y) / 20
    within = [sum((a - b).norm() for a in z for b in z) / (len(z) * (len(z) - 1)) for z in (x, y)]
    torch.testing.assert_close(energy_distance(x, y), 2 * between - within[0] - within[1])


def test_circulating_field_is_the_score_and_its_quarter_turn() -> None:
    problem = make_mixture(problems.plane(0.7))
    x = problem.mixture.sample(20, generator())
    difference = circulating(problem, 2.0)(x) - problem.mixture.score(x)
    torch.testing.assert_close((difference * problem.mixture.score(x)).sum(1), torch.zeros(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(difference.norm(dim=1), 2 * problem.mixture.score(x).norm(dim=1))


# ---------------------------------------------------------------- runs


def test_smoke_run_ranks_known_fields_as_measured(finished: Run) -> None:
    times, losses, proxies = (results.relative(finished, column) for column in ("time", "loss", "proxy"))
    for turn in TURNS[1:]:
        assert losses[turn][0] == pytest.approx(times[turn][0], abs=0.15)
    assert times[2.0][0] < times[1.0][0] < 0.8
    assert losses[2.0][0] < losses[1.0][0] < 0.8
    assert proxies[2.0][0] > 1


def test_smoke_run_and_its_summary(finished: Run) -> None:
    measured = [(row["problem"], row["field"]) for row in finished.rows("measured")]
    assert measured == [(name, kind) for name in problems.PROBLEMS for kind in kinds(finished, name)]
    assert {path.stem for path in finished.figures} == {"ranking", "costs"}
    assert all(path.stat().st_size > 10_000 for path in finished.figures)
    gaussian = {row["schedule"] for row in finished.rows("cost") if row["problem"] == problems.GAUSSIAN}
    assert gaussian == {CONSTANT, CYCLIC, CHEBYSHEV}
    text = (finished.out / "summary.md").read_text()
    assert "16-D Gaussian, score + exact v, bias 0.05: times fewer, all schedules" in text


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


def test_evaluations_are_the_fewest_at_that_bias(tmp_path: Path) -> None:
    run = make_run(tmp_path, bias=0.03)
    common = {"kind": "cost", "problem": problems.WIDE, "field": "score", "seed": 0, "sizes": ""}
    for schedule, evaluations, bias in ((CONSTANT, 20.0, 0.01), (CONSTANT, 9.0, 0.04), (CYCLIC, 12.0, 0.02)):
        run.log(schedule=schedule, evaluations=evaluations, bias=bias, **common)
    found = [results.evaluations(run, problems.WIDE, "score", 0.03, kind) for kind in (None, CONSTANT, CHEBYSHEV)]
    assert found == [[12.0], [20.0], [math.inf]]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema": 1.0}, "ema must be below 1, got 1.0"),
        ({"learned_on": ("cats",)}, "learned_on must hold names among .*, got 'cats'"),
        ({"data": 10}, "data must be at least 32, got 10"),
        ({"bias": 0.0}, "bias must be above 0, got 0.0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(experiment.EXPERIMENT.config("smoke"), **changes)
