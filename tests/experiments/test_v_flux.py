"""Checks of v-flux: closed forms against other solvers and automatic differentiation, training, and a repeated run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov, sqrtm
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from experiments.common.distances import wasserstein2
from experiments.common.run import Run
from experiments.v_flux import experiment, gaussian
from experiments.v_flux.experiment import EXPERIMENT, main, make_flow
from experiments.v_flux.measure import TIMES, averages, carry, fresh, held_out_loss, starts
from experiments.v_flux.mixture import ComponentPath, MixtureFlow
from experiments.v_flux.results import FIELDS
from experiments.v_flux.training import CAUSAL, FLOW, FLUX, LEAST, TURNING, FlowField, LeastEnergyMatching, make_field
from fluxmatching import FluxOptions, LinearPath, UniformTimes, marginal_velocity, v_flux_loss

PAIR = gaussian.make_pair(0.8)
MEANS = torch.tensor([[-1.0, 0.8], [0.3, -1.1], [1.2, 0.4], [0.2, 1.5]], dtype=torch.float64)
FLOW_TO_FOUR = MixtureFlow(MEANS, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_run(out: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, out, progress=False)


def divergence(field: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇·field by automatic differentiation, `[N]`."""
    x = x.detach().requires_grad_()
    value = field(x)
    return torch.stack([torch.autograd.grad(value[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)]).sum(0)


def jacobian(field: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂f_a/∂x_b, `[N, 2, 2]`."""
    x = x.detach().requires_grad_()
    value = field(x)
    return torch.stack([torch.autograd.grad(value[:, d].sum(), x, retain_graph=True)[0] for d in range(2)], 1)


# ---------------------------------------------------------------- Gaussian pair


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_least_energy_matrix_is_the_solution_that_scipy_finds(t: float) -> None:
    product, covariance = PAIR.product(t), PAIR.covariance(t)
    found = gaussian.least_energy_matrix(product, covariance)
    truth = torch.from_numpy(solve_continuous_lyapunov(covariance.numpy(), (product + product.T).numpy()))
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_linear_fields_carry_the_gaussian_path_except_the_masked_one(t: float) -> None:
    """∇·(p f) = -∂p/∂t, with p of torch.distributions and the derivative in t as a difference."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator())

    def density(x: Tensor, t: float) -> Tensor:
        return MultivariateNormal(torch.zeros(2, dtype=torch.float64), PAIR.covariance(t)).log_prob(x).exp()

    outflow = -(density(x, t + 1e-5) - density(x, t - 1e-5)) / 2e-5
    for name, matrix in gaussian.FIELDS.items():
        found = matrix(PAIR.product(t), PAIR.covariance(t))
        error = divergence(lambda z, found=found: density(z, t)[:, None] * (z @ found.T), x) - outflow
        if name in gaussian.CARRYING:
            assert error.abs().max() < 1e-8, name
        else:
            assert error.abs().max() > 0.1 * outflow.abs().max(), name


def test_velocity_is_the_regression_of_the_difference_on_the_sample() -> None:
    root = torch.from_numpy(sqrtm(PAIR.data.numpy()))
    t, count = 0.4, 200_000
    x0, other = torch.randn(2, count, 2, dtype=torch.float64, generator=generator())
    x1 = 0.8 * x0 @ gaussian.rotation(90).T @ root.T + math.sqrt(1 - 0.64) * other @ root.T
    torch.testing.assert_close(x1.T @ x1 / count, PAIR.data, rtol=0.02, atol=0.02)
    x = t * x1 + (1 - t) * x0
    found = torch.linalg.lstsq(x, x1 - x0).solution.T
    product, covariance = PAIR.product(t), PAIR.covariance(t)
    torch.testing.assert_close(gaussian.velocity_matrix(product, covariance), found, rtol=0.02, atol=0.02)
    masked = gaussian.masked_matrix(product, covariance)
    assert masked[0].tolist() == pytest.approx(
        [(x[:, 0] @ (x1 - x0)[:, 0] / x[:, 0].square().sum()).item(), 0], abs=0.02
    )
    torch.testing.assert_close(masked[1], found[1], rtol=0.02, atol=0.02)


def test_no_field_that_carries_the_path_has_less_energy_than_the_symmetric_one() -> None:
    product, covariance = PAIR.product(0.4), PAIR.covariance(0.4)
    least = gaussian.least_energy_matrix(product, covariance)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)

    def energy(matrix: Tensor) -> Tensor:
        return (matrix @ covariance @ matrix.T).trace()

    for size in (-1.0, -1e-3, 1e-3, 1.0):
        other = least + size * turn @ torch.linalg.inv(covariance)  # other Σ + Σ otherᵀ is the same
        extra = energy(size * turn @ torch.linalg.inv(covariance))
        assert energy(other).item() == pytest.approx((energy(least) + extra).item(), rel=1e-12)
    causal = gaussian.causal_matrix(product, covariance)
    assert causal[0, 1] == 0
    assert energy(causal) > energy(least)


# ---------------------------------------------------------------- mixture


def test_component_path_has_the_marginals_of_the_linear_path() -> None:
    path, t = ComponentPath(0.3), torch.tensor([0.0, 0.35, 1.0], dtype=torch.float64, requires_grad=True)
    c = path.coefficients(t)
    linear = LinearPath().coefficients(t)
    torch.testing.assert_close(c.sigma.square(), linear.sigma.square() + 0.3 * linear.alpha.square())
    (slope,) = torch.autograd.grad(c.sigma.sum(), t)
    torch.testing.assert_close(c.sigma_rate, slope)
    torch.testing.assert_close(c.sigma_sigma_rate, c.sigma * slope)


@pytest.mark.parametrize("t", [0.0, 0.35, 1.0])
def test_velocity_of_the_mixture_is_that_of_the_library(t: float) -> None:
    x = 3 * torch.randn(200, 2, dtype=torch.float64, generator=generator())
    truth = marginal_velocity(x, t, MEANS, FLOW_TO_FOUR.path)
    torch.testing.assert_close(FLOW_TO_FOUR.velocity(x, torch.full((200,), t)), truth)
    assert FLOW_TO_FOUR.velocity(x.float(), torch.full((200,), t)).dtype == torch.float32


def test_velocity_of_samples_tends_to_that_of_the_mixture() -> None:
    data = FLOW_TO_FOUR.sample(1.0, 100_000, generator()).double()
    x = torch.randn(100, 2, dtype=torch.float64, generator=generator(1))
    found = marginal_velocity(x, 0.5, data, LinearPath())
    torch.testing.assert_close(found, FLOW_TO_FOUR.velocity(x, torch.full((100,), 0.5)), rtol=0.1, atol=0.1)


def continuity(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """(∂p/∂t + ∇·(p f))/p, with p of torch.distributions, by automatic differentiation."""
    t = t.detach().requires_grad_()

    def density(x: Tensor, t: Tensor) -> Tensor:
        sigma = ((1 - t).square() + FLOW_TO_FOUR.variance * t.square()).sqrt()
        parts = Independent(Normal(t[:, None, None] * MEANS, sigma[:, None, None]), 1)
        return MixtureSameFamily(Categorical(torch.ones(len(t), len(MEANS)).double()), parts).log_prob(x).exp()

    p = density(x, t)
    (rate,) = torch.autograd.grad(p.sum(), t)
    outflow = divergence(lambda z: density(z, t.detach())[:, None] * field(z, t.detach()), x)
    return (rate + outflow) / p.detach()


def test_exact_fields_obey_the_continuity_equation_and_the_masked_velocity_does_not() -> None:
    t = torch.linspace(0.02, 0.98, 300, dtype=torch.float64)
    x = 1.5 * torch.randn(300, 2, dtype=torch.float64, generator=generator())
    assert continuity(FLOW_TO_FOUR.velocity, x, t).abs().max() < 1e-9
    assert continuity(FLOW_TO_FOUR.causal, x, t).abs().max() < 1e-7
    assert continuity(FLOW_TO_FOUR.masked_velocity, x, t).abs().mean() > 0.1


def test_velocity_is_a_gradient_and_the_causal_field_is_causal_and_finite_far_away() -> None:
    x = torch.cat([torch.randn(100, 2, generator=generator()), torch.tensor([[40.0, -60.0], [-3.0, 80.0]])]).double()
    t = torch.full((len(x),), 0.6)
    matrices = jacobian(lambda z: FLOW_TO_FOUR.velocity(z, t), x)
    torch.testing.assert_close(matrices, matrices.transpose(1, 2))
    for field in (FLOW_TO_FOUR.causal, FLOW_TO_FOUR.masked_velocity):
        matrices = jacobian(lambda z, field=field: field(z, t), x)
        assert matrices.isfinite().all()
        assert matrices[:, 0, 1].abs().max() == 0
        assert matrices[:, 1, 0].abs().max() > 0.1


# ---------------------------------------------------------------- networks and losses


def test_mask_of_the_network_is_a_mask() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(30, 2), torch.rand(30)
    masked = jacobian(lambda z: FlowField(16, 1.5, causal=True)(z, t), x)
    assert masked[:, 0, 1].abs().max() == 0
    assert masked[:, 1, 0].abs().min() > 0
    full = jacobian(lambda z: FlowField(16, 1.5)(z, t), x)
    assert full[:, 0, 1].abs().min() > 0


def test_network_starts_at_the_velocity_of_a_normal_distribution_with_a_turn() -> None:
    field = FlowField(8, 2.5, turn=0.7)
    nn.init.zeros_(field.network.layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(field.network.layers[-1].bias)  # type: ignore[arg-type]
    x, t = torch.randn(40, 2, generator=generator()), torch.rand(40, generator=generator())
    normal = ComponentPath(2.5).coefficients(t.double())
    linear = (normal.sigma_rate / normal.sigma).float().unsqueeze(-1) * x
    turn = 0.7 * torch.stack([-x[:, 1], x[:, 0]], 1)
    torch.testing.assert_close(field(x, t), linear + turn)


def test_variants_of_one_architecture_start_with_the_same_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    x, t = torch.randn(9, 2), torch.full((9,), 0.3)
    plain, turning, least, flow, causal = (make_field(run, n, 1.5)(x, t) for n in (FLUX, TURNING, LEAST, FLOW, CAUSAL))
    assert torch.equal(plain, flow)
    assert torch.equal(turning, least)
    assert not torch.equal(plain[:, 0], causal[:, 0])
    torch.testing.assert_close(turning - plain, run.config.turn * torch.stack([-x[:, 1], x[:, 0]], 1))


class Linear(nn.Module):
    """f(x, t) = F x."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ self.matrix.T


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_energy_removes_the_rotation_that_v_flux_leaves_alone(weight: float) -> None:
    """Linear fields of Gaussian data at one time: B, the Lyapunov solution, with a turn W at the start.

    v-flux alone must keep B + W, and with the energy the minimum is B/(1+λ).
    """
    t = 0.2
    data = torch.randn(1000, 2, generator=generator())
    data = (data - data.mean(0)) @ torch.tensor([[2.0, 0.5], [0.0, 0.6]])
    spread = data.T @ data / len(data)
    covariance = t**2 * spread + (1 - t) ** 2 * torch.eye(2)
    least = gaussian.least_energy_matrix(t * spread - (1 - t) * torch.eye(2), covariance)
    turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]]) @ torch.linalg.inv(covariance)
    options, times = FluxOptions(divergence="exact", strata=1), UniformTimes(t - 0.001, t + 0.001)
    loss = LeastEnergyMatching(Linear(least + turn), options, times=times, refs=data, energy_weight=weight)
    # Adam would follow the noise where the gradient vanishes.
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    steps, mean = 120, torch.zeros(2, 2)
    for step in range(steps):
        optimizer.zero_grad()
        loss(data[torch.randint(len(data), (400,), generator=generator(step))], seed=step)[0].backward()
        optimizer.step()
        if step >= steps - 50:
            mean += loss.get_parameter("field.matrix").detach() / 50
    truth = least / (1 + weight) if weight else least + turn
    assert (mean - truth).norm() < 0.1 * turn.norm()


def test_held_out_loss_is_the_squared_error_of_the_part_that_moves_the_marginals(tmp_path: Path) -> None:
    """A constant is a gradient, so all of it counts; exact fields have no error at all."""
    run = make_run(tmp_path, loss_batch=256, loss_repeats=4)
    flow = make_flow(run)
    for field in (flow.velocity, flow.causal):
        mean, error = held_out_loss(run, flow, field)
        assert abs(mean) < 1e-4
        assert error < 1e-4
    offset = torch.tensor([0.5, -1.0])
    # At small t the density has one mode. Later the horizon is too short for the exchange between modes.
    early = make_run(tmp_path / "early", loss_batch=256, loss_repeats=4, end=0.2)
    for which, least in ((early, 0.95), (run, 0.7)):
        mean, error = held_out_loss(which, flow, lambda x, t: flow.velocity(x, t) + offset)
        assert least * 1.25 < mean < 1.05 * 1.25
        assert error < 0.1


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_loss_sees_only_a_part_of_a_constant_error(t: float) -> None:
    """Data N(0, I) and f = v + c: ∇r = -c/Var, Var = t² + σ², so σ²ℓ/2 is |c|² (σ²/Var) (1 - e⁻⁴), not |c|²."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(1024).clamp(1e-4, 1 - 1e-4)
    data = torch.special.ndtri(uniform)
    offset, options = torch.tensor([0.6, -0.8]), FluxOptions(divergence="exact")

    def field(x: Tensor, t: Tensor) -> Tensor:
        return marginal_velocity(x, t, data) + offset

    losses = [v_flux_loss(field, data[k::2], t, LinearPath(), options, refs=data, seed=k).mean() for k in range(2)]
    seen = (1 - t) ** 2 / 2 * sum(losses) / len(losses)
    assert seen.item() == pytest.approx((1 - t) ** 2 / (t**2 + (1 - t) ** 2) * (1 - math.exp(-4)), rel=0.05)


@pytest.mark.parametrize("t", [0.0, 0.7, 1.0])
def test_averages_of_exact_fields(tmp_path: Path, t: float) -> None:
    run = make_run(tmp_path, points=4000)
    flow = make_flow(run)
    velocity, causal = (averages(run, flow, field, t) for field in (flow.velocity, flow.causal))
    assert velocity["to_velocity"] == causal["to_causal"] == 0
    # Of the fields that carry the path, the gradient has the least energy: E|f|² = E|v|² + E|f - v|².
    assert causal["energy"] == pytest.approx(velocity["energy"] + causal["to_velocity"], rel=0.05)
    assert (causal["to_velocity"] > 0.1 * velocity["energy"]) == (t == 0.7)
    far = averages(run, flow, lambda x, t: flow.velocity(x, t) + torch.tensor([3.0, 0.0]), t)
    assert far["to_velocity"] == pytest.approx(9, rel=1e-5)


# ---------------------------------------------------------------- runs


def test_exact_fields_keep_the_marginals_and_the_masked_velocity_does_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=500)
    flow = make_flow(run)
    x, late = starts(run), TIMES[-2:]
    found = {field: carry(field, x)[-2:] for field in (flow.velocity, flow.causal, flow.masked_velocity)}
    exact = {t: fresh(run, flow, t) for t in late}
    floor = {t: wasserstein2(flow.sample(t, 500, generator(1)), exact[t]) for t in late}
    velocity, causal, masked = (
        max(wasserstein2(end, exact[t]) / floor[t] for end, t in zip(ends, late, strict=True))
        for ends in found.values()
    )
    assert velocity < 1.4
    assert causal < 1.4
    assert masked > 1.5
    # The trajectories differ: the ends are farther from each other, point by point, than their distributions.
    ends = [found[field][-1] for field in (flow.velocity, flow.causal)]
    assert (ends[0] - ends[1]).square().sum(1).mean().sqrt() > 2 * wasserstein2(*ends)


def test_smoke_run_and_its_summary(finished: Run) -> None:
    assert {row["field"] for row in finished.rows("gaussian")} == set(gaussian.FIELDS)
    for kind, count in (("marginal", 5), ("euler", 3), ("average", 21), ("loss", 1)):
        assert [row["field"] for row in finished.rows(kind)] == [name for name in FIELDS for _ in range(count)]
    assert {path.stem for path in finished.figures} == {"trajectories", "marginals", "comparison", "gaussian"}
    assert all(path.stat().st_size > 10_000 for path in finished.figures)
    lines = (finished.out / "summary.md").read_text()
    assert "v-flux, causal: W2 over that of exact samples" in lines
    gaussian_lines = [result for result in finished.results if result.quantity.startswith("Gaussian")]
    assert [result.passed for result in gaussian_lines] == [True, True, None]


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"correlation": 1.0}, "correlation and ema must be below 1, got 1.0"),
        ({"start": 0.5, "end": 0.4}, "start < end < 1 must hold, got 0.5 and 0.4"),
        ({"euler_steps": ()}, "euler_steps must not be empty"),
        ({"loss_repeats": 1}, "loss_repeats must be at least 2, got 1"),
        ({"data": 10}, "data must be at least 64, got 10"),
    ],
)
def test_bad_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(experiment.EXPERIMENT.config("smoke"), **changes)
