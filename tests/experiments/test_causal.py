"""Checks of causal: closed forms against automatic differentiation and the losses of the library, solver, and runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from experiments.causal import experiment, fit
from experiments.causal.data import KINDS, Environment, make_environments, make_system, shift_of, simulate
from experiments.causal.drifts import Basis, BasisDrift
from experiments.causal.dual import dual_quadratic
from experiments.causal.experiment import EXPERIMENT, main
from experiments.causal.fit import Fit, Problem, Term, best_size
from experiments.causal.flux import FluxSettings, derivatives, of_chains
from experiments.causal.kds import gaussian_kds, pairs_kds
from experiments.causal.lasso import lasso
from experiments.causal.measure import METHODS, NO_EFFECT, TRUTH, Boxed, Setting, structure
from experiments.causal.quadratic import Dense, Quadratic, value
from experiments.common.kernel_weights import mean_perplexity
from experiments.common.run import Run
from fluxkernels import flux_pass
from fluxmatching import (
    CosineFeatures,
    Draws,
    FluxOptions,
    LinearFeatures,
    QuadraticFeatures,
    TruncatedExponentialHorizon,
    dual_flux_loss,
    flux_target,
    quadratic_flux_loss,
)
from fluxmatching.losses.dual import Features

NOISE = 0.7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, "torch", torch.device("cpu"), 0, out, progress=False)


def problem(samples: int, d: int = 3, *, nonlinear: bool = True) -> tuple[Tensor, BasisDrift]:
    """Data with unequal spreads, and a drift with a random parameter for every function."""
    x = normal(samples, d) * torch.linspace(0.5, 1.5, d) + 0.3
    basis = Basis.of(x, nonlinear)
    return x, BasisDrift(basis, normal(d, len(basis.coordinates), seed=1))


def allowed(drift: BasisDrift) -> tuple[BasisDrift, Tensor]:
    """The drift with the parameters that are allowed, and these, `[Q]`."""
    theta = drift.theta[drift.basis.allowed]
    return dataclasses.replace(drift, theta=drift.basis.full(theta)), theta


# ---------------------------------------------------------------- systems


@pytest.mark.parametrize("kind", KINDS)
def test_parents_are_what_enters_the_drift(kind: str) -> None:
    system = make_system(kind, 7, 2, 1.0, generator())
    slopes = torch.func.vmap(torch.func.jacrev(system))(normal(20, 7)).abs().amax(0)
    wanted = system.parents | torch.eye(7, dtype=torch.bool)
    assert torch.equal(slopes > 0, wanted)
    assert system.parents.sum(1).tolist() == [2] * 7
    assert system.parents.diagonal().sum() == 0
    assert system.single()(torch.zeros(3, 7)).dtype == torch.float32


def test_samples_of_a_linear_system_have_the_stationary_mean_and_covariance() -> None:
    """Mean -A⁻¹(c + shift); the covariance solves A Σ + Σ Aᵀ = -σ²."""
    system = make_system("linear", 4, 2, 0.8, generator(2))
    environments = make_environments(system, [None, 1], 20_000, 15.0, 0.1, generator())
    matrix = system.weights - system.decay.diag()
    covariance = torch.from_numpy(solve_continuous_lyapunov(matrix.numpy(), -0.64 * torch.eye(4).double().numpy()))
    for environment in environments:
        shift = shift_of(environment.target, environment.shift, 4)
        mean = -torch.linalg.solve(matrix, system.offset + shift)
        torch.testing.assert_close(environment.x.mean(0), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(environment.x.T.cov(), covariance, rtol=0, atol=0.03)
    assert environments[0].shift == 0
    assert 1.5 <= abs(environments[1].shift) <= 2.5


def test_the_error_of_a_simulation_is_of_second_order_in_the_step() -> None:
    """dx = -x dt + dW has variance ½; Euler-Maruyama with step h has 1/(2 - h)."""
    x = simulate(lambda x: -x, torch.zeros(400_000, 1), torch.zeros(1), 1.0, 8.0, 0.4, generator())
    assert x.var().item() == pytest.approx(0.5, abs=0.04)
    assert abs(x.var().item() - 0.5) < 0.4 * (1 / 1.6 - 0.5)


# ---------------------------------------------------------------- drifts and objectives


@pytest.mark.parametrize("nonlinear", [False, True])
def test_derivatives_of_the_basis_are_those_of_autograd(nonlinear: bool) -> None:
    x, drift = problem(6, nonlinear=nonlinear)
    options = FluxSettings(0.5, 4, 1, smoothed=False)
    value, gradient, hessian = derivatives(x, x, drift.basis, options)
    torch.testing.assert_close(value, drift.basis(x))
    torch.testing.assert_close(gradient, torch.func.vmap(torch.func.jacrev(drift.basis))(x))
    torch.testing.assert_close(hessian, torch.func.vmap(torch.func.hessian(drift.basis))(x))
    assert drift.basis.allowed.sum().item() == 3 * 4


def test_derivatives_of_the_smoothed_basis_are_those_of_autograd() -> None:
    refs, drift = problem(30)
    z = normal(5, 3, seed=4)

    def smoothed(z: Tensor) -> Tensor:
        return (-0.5 * ((z - refs) / 0.8).square().sum(1)).softmax(0) @ drift.basis(refs)

    found = derivatives(z, refs, drift.basis, FluxSettings(0.8, 4, 1, smoothed=True))
    for part, function in zip(
        found, (smoothed, torch.func.jacrev(smoothed), torch.func.hessian(smoothed)), strict=True
    ):
        torch.testing.assert_close(part, torch.func.vmap(function)(z))


def kernel_deviation(
    kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, drift: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean of A_x A_x' k over all pairs, A applied by automatic differentiation."""

    def apply(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def applied(z: Tensor, *others: Tensor) -> Tensor:
            laplacian = torch.func.hessian(function)(z, *others).trace()
            return drift(z[None])[0] @ torch.func.grad(function)(z, *others) + NOISE**2 / 2 * laplacian

        return applied

    in_first = apply(kernel)
    in_both = apply(lambda second, first: in_first(first, second))
    over_first = torch.func.vmap(in_both, (None, 0))
    return torch.func.vmap(over_first, (0, None))(x, x).mean()


def test_kernel_deviations_are_those_of_automatic_differentiation() -> None:
    x, drift = problem(6)
    drift, theta = allowed(drift)
    length = 1.3

    def coordinates(one: Tensor, other: Tensor) -> Tensor:
        return (-0.5 * ((one - other) / drift.basis.scale / length).square()).exp()

    def pairs(one: Tensor, other: Tensor) -> Tensor:
        k = coordinates(one, other)
        return (k[0] * k[1] + k[0] * k[2] + k[1] * k[2]) / 3

    def gaussian(one: Tensor, other: Tensor) -> Tensor:
        return coordinates(one, other).prod()

    for kds, kernel in ((gaussian_kds, gaussian), (pairs_kds, pairs)):
        found = kds(x, drift.basis, NOISE, length)
        truth = kernel_deviation(kernel, x, drift)
        torch.testing.assert_close(value(found, theta), truth, rtol=1e-10, atol=0)
        check_block(found, digits=6)


def check_block(found: Quadratic, digits: int = 9) -> None:
    """Compare entries of H with differences of the slope, which is affine; some rows and columns, in any order."""
    every = torch.arange(len(found.linear))
    whole = found.block(every, every)
    differences = [found.slope(unit) - found.linear for unit in torch.eye(len(every), dtype=torch.float64)]
    error = 10**-digits * whole.abs().max().item()
    torch.testing.assert_close(whole, torch.stack(differences, 1), rtol=0, atol=error)
    rows, columns = torch.tensor([7, 1, 2]), torch.tensor([0, 9, 7, 5])
    torch.testing.assert_close(found.block(rows, columns), whole[rows][:, columns], rtol=0, atol=error)
    assert torch.linalg.eigvalsh(whole)[0] > -error


@pytest.mark.parametrize("nonlinear", [False, True])
def test_dual_objective_is_that_of_the_library(nonlinear: bool) -> None:
    x, drift = problem(300, nonlinear=nonlinear)
    drift, theta = allowed(drift)
    cosines = CosineFeatures.draw(x, 30, num_coordinates=2)
    features: list[Features] = [LinearFeatures(), QuadraticFeatures(), cosines]

    def scaled(z: Tensor) -> Tensor:
        return 2 / NOISE**2 * drift(z)

    found = dual_quadratic(x, drift.basis, NOISE, cosines, 0.02)
    torch.testing.assert_close(
        value(found, theta), dual_flux_loss(scaled, x, features, ridge=0.02, halves=False).mean()
    )
    check_block(found)
    alone = dual_quadratic(x, drift.basis, NOISE, None, 0.02)
    torch.testing.assert_close(
        value(alone, theta), dual_flux_loss(scaled, x, features[:2], ridge=0.02, halves=False).mean()
    )
    check_block(alone)
    exact = dual_quadratic(x, drift.basis, NOISE, None, 1e-13)
    torch.testing.assert_close(value(exact, theta), quadratic_flux_loss(scaled, x)[0], rtol=1e-8, atol=0)


def test_flux_objective_has_the_value_and_the_gradient_of_the_library() -> None:
    x, drift = problem(40)
    sigma, tau, horizon = 0.6, torch.tensor(0.7, dtype=torch.float64), TruncatedExponentialHorizon(1.0, 4.0)
    noise = normal(5, 40, 3, seed=7)
    chains = flux_pass(x, x, sigma**2, tau, noise=noise, backend="torch")
    options = FluxSettings(sigma, 40, 1, smoothed=False, backend="torch")
    matrix, linear, constant = of_chains(chains, x, drift.basis, NOISE, options, tau)
    theta = drift.theta.clone().requires_grad_()

    def field(z: Tensor) -> Tensor:
        return 2 / NOISE**2 * BasisDrift(drift.basis, theta)(z)

    draws = Draws(tau=tau, start=noise[0], chain=noise[1:])
    target = flux_target(
        field, x, sigma, FluxOptions(horizon=horizon, divergence="exact", backend="torch"), draws=draws
    )
    scale = -math.expm1(-4.0)  # e^{-τ}/q(τ)
    loss = target.loss(field).mean()
    loss.backward()
    assert theta.grad is not None
    slope = scale * (matrix @ drift.theta.flatten() + linear.flatten())
    torch.testing.assert_close(2 * slope, theta.grad.flatten(), rtol=1e-8, atol=1e-10)
    start = dataclasses.replace(drift, theta=torch.zeros_like(drift.theta))
    at_zero = flux_target(
        start, x, sigma, FluxOptions(horizon=horizon, divergence="exact", backend="torch"), draws=draws
    )
    torch.testing.assert_close(2 * scale * constant, at_zero.loss(start).mean(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("sigma", "low", "high"), [(1e-3, 1, 1.01), (30.0, 49.9, 50.01)])
def test_the_perplexity_counts_the_points_that_matter(sigma: float, low: float, high: float) -> None:
    x = normal(50, 3)
    z = x + sigma * torch.randn(x.shape, generator=generator(), dtype=x.dtype)
    assert low - 1e-9 <= mean_perplexity(z, x, sigma) <= high


# ---------------------------------------------------------------- solver


def random_quadratic(count: int, seed: int = 0) -> Dense:
    root = normal(count, count, seed=seed)
    return Dense(root @ root.T / count + 0.1 * torch.eye(count), normal(count, seed=seed + 1), normal(1)[0])


@pytest.mark.parametrize("fraction", [1.01, 0.3, 0.01])
@pytest.mark.parametrize("curvature", [0.1, 1e-6])
def test_lasso_is_at_its_optimum_from_any_start(fraction: float, curvature: float) -> None:
    """The slope of a parameter is -λ times its sign, or at most λ in size where it is 0; the minimum is unique."""
    root, linear = normal(40, 30), normal(40, seed=1)
    hessian = root @ root.T / 30 + curvature * torch.eye(40)
    penalized = torch.arange(40) >= 4
    alone = torch.zeros(40).double()
    alone[:4] = -torch.linalg.solve(hessian[:4, :4], linear[:4])
    penalty = fraction * (hessian @ alone + linear).abs()[4:].max().item()
    for start in (torch.zeros(40).double(), normal(40, seed=5)):
        theta = lasso(hessian, linear, penalized, penalty, start)
        slope = hessian @ theta + linear
        inside = penalized & (theta == 0)
        assert (slope[inside].abs() <= penalty * (1 + 1e-5)).all()
        wanted = torch.where(penalized, -penalty * theta.sign(), 0)
        torch.testing.assert_close(slope[~inside], wanted[~inside], rtol=0, atol=1e-5 * penalty)
        assert (inside.sum() == 36) == (fraction > 1)


def make_problem(known: bool) -> tuple[Problem, list[Term]]:
    size = 0.5 if known else None
    terms = [Term(random_quadratic(12), None, None), Term(random_quadratic(12, 1), 1, size)]
    terms += [Term(random_quadratic(12, 2), 0, size), Term(random_quadratic(12, 3), 2, 0.3)]
    return Problem.of([terms[:1], terms[1:3], terms[3:]], torch.arange(12) > 2), terms


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("left_out", [None, 2])
def test_fit_is_the_minimum_over_the_chosen_edges_and_the_sizes(known: bool, left_out: int | None) -> None:
    problem, terms = make_problem(known)
    terms = terms if left_out is None else terms[:3]
    counts = []
    for found in problem.path((1.01, 0.5, 0.01), left_out):
        assert found.violation < 1e-5
        sizes = [
            best_size(term, found.theta) if term.size is None and term.index is not None else None for term in terms
        ]
        slope = sum((term.slope(found.theta, size) for term, size in zip(terms, sizes, strict=True)), torch.zeros(12))
        kept = (found.theta != 0) | (torch.arange(12) <= 2)
        torch.testing.assert_close(slope[kept], torch.zeros(int(kept.sum())).double(), atol=2e-5, rtol=0)
        counts.append(int(kept.sum()))
    assert counts[0] == 3 < counts[1] < counts[2]


@pytest.mark.parametrize("known", [True, False])
def test_working_set_grows_to_the_same_fits(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = make_problem(known)
    monkeypatch.setattr(fit, "WHOLE", 0)
    growing, _ = make_problem(known)
    assert len(whole.working) == 12
    assert growing.working.tolist() == [0, 1, 2]
    fractions, paths = (0.7, 0.5, 0.1), [None, 1, 2]
    wanted = zip(*[whole.path(fractions, left_out) for left_out in paths], strict=True)
    for found in zip(*[growing.path(fractions, left_out) for left_out in paths], strict=True):
        for one, other in zip(found, next(wanted), strict=True):
            torch.testing.assert_close(one.theta, other.theta, rtol=1e-4, atol=1e-5)
    assert 3 < len(growing.working) <= 12


def test_best_size_of_a_shift_is_the_minimum() -> None:
    c, theta = random_quadratic(4, 2), normal(4, seed=9)
    best, unit = best_size(Term(c, 2, None), theta), torch.eye(4).double()[2]
    assert all(value(c, theta + best * unit) <= value(c, theta + (best + e) * unit) for e in (-0.01, 0.01))


# ---------------------------------------------------------------- measures


def test_structure_of_the_true_drift_is_perfect_and_of_none_is_not() -> None:
    system = make_system("linear", 5, 2, 1.0, generator())
    x = normal(200, 5)
    basis = Basis(torch.zeros(5).double(), torch.ones(5).double(), nonlinear=False)
    setting = Setting("linear", 5, 0, system, basis, [Environment(None, 0.0, x)], [])
    theta = torch.cat([system.offset[:, None], system.weights - system.decay.diag()], 1)
    exact = theta[basis.allowed]
    torch.testing.assert_close(setting.drift(exact)(x), system(x))
    assert structure(setting, Fit(0, exact, 0)) == {"f1": 1, "precision": 1}
    reversed_edges = torch.cat([system.offset[:, None], system.weights.T], 1)[basis.allowed]
    assert structure(setting, Fit(0, reversed_edges, 0))["f1"] < 0.8
    assert not setting.edges[setting.constants].any()
    assert setting.edges.sum() == 5 * 4


def test_box_keeps_unstable_drifts_finite() -> None:
    low, high = -torch.ones(1), torch.ones(1)
    x = simulate(
        Boxed(lambda x: 5 * x, low, high), torch.full((10, 1), 0.5), torch.zeros(1), 0.1, 20.0, 0.1, generator()
    )
    assert (x.abs() < 3).all()


# ---------------------------------------------------------------- runs


def test_smoke_run_and_its_summary(finished: Run) -> None:
    rows = finished.rows("fit")
    assert [row["method"] for row in rows] == [NO_EFFECT, TRUTH, *METHODS]
    assert all(math.isfinite(row["error"]) and math.isfinite(row["w2"]) for row in rows)
    assert {path.stem for path in finished.figures} == {"methods"}
    assert all(path.stat().st_size > 10_000 for path in finished.figures)
    assert "tanh, d = 4" in (finished.out / "summary.md").read_text()


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


@pytest.mark.usefixtures("unpainted")
def test_unknown_sizes_of_shifts_are_fitted(tmp_path: Path) -> None:
    run = make_run(tmp_path, kinds=("linear",), known=False, methods=("dual, quadratic",), samples=400, time=8.0)
    main(run)
    errors = {row["method"]: row["error"] for row in run.rows("fit")}
    assert errors["dual, quadratic"] < 0.6 * errors[NO_EFFECT]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kinds": ("cubic",)}, "kinds must be among linear, tanh, perceptron, got cubic"),
        ({"methods": ()}, "methods must not be empty"),
        ({"dims": (2,)}, "dims must be at least 4, got 2"),
        ({"samples": 10}, "samples must be at least 50, got 10"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(experiment.EXPERIMENT.config("smoke"), **changes)


@pytest.mark.parametrize(
    ("kind", "parents", "text"), [("cubic", 2, "kind must be"), ("tanh", 4, "num_parents must be")]
)
def test_bad_systems(kind: str, parents: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_system(kind, 4, parents, 1.0, generator())
