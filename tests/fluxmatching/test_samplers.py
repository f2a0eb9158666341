"""Samplers against processes whose moments are known at every step."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fluxmatching import (
    ODESolver,
    edm_heun,
    exponential_schedule,
    karras_schedule,
    log_likelihood,
    predictor_corrector,
    probability_flow,
    reverse_ve,
    unadjusted_langevin,
)

N = 100_000


def test_unadjusted_langevin_on_a_gaussian() -> None:
    """x ← (1-η)x + √(2η)ξ has variance 1/(1-η/2) in the end: the step's own bias included."""
    generator = torch.Generator().manual_seed(1)
    x = unadjusted_langevin(lambda z: -z, torch.full((N, 2), 5.0), step_size=0.1, num_steps=120, generator=generator)
    variance = 1 / (1 - 0.05)
    assert x.mean().item() == pytest.approx(5 * 0.9**120, abs=4 * (variance / (2 * N)) ** 0.5)
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * (2 / (2 * N)) ** 0.5)


def test_rotation_leaves_the_gaussian_in_place() -> None:
    """f = -x + 2Jx is no score, and has the same stationary distribution; its trajectories turn."""
    turn = torch.tensor([[-1.0, -2.0], [2.0, -1.0]])
    step, kept = 0.01, []
    x = unadjusted_langevin(
        lambda z: z @ turn.T,
        torch.randn(N // 4, 2),
        step_size=step,
        num_steps=400,
        callback=lambda k, x: kept.append(x),
    )
    # E|x'|² = |1 + η A|² E|x|² + 2ηD with A = -1 ± 2i: stationary variance 2η/(1 - (1-η)² - 4η²).
    variance = 2 * step / (1 - (1 - step) ** 2 - 4 * step**2)
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * (4 / N) ** 0.5 + 0.005)
    circulation = (kept[-2][:, 0] * kept[-1][:, 1] - kept[-2][:, 1] * kept[-1][:, 0]).mean().item() / step
    assert circulation == pytest.approx(4 * variance, rel=0.1)


def test_reverse_ve_on_a_point() -> None:
    """Data at one point: the score is -x/σ², and each update's mean and variance are known."""
    sigmas = exponential_schedule(50, 0.01, 10.0)
    x = 10.0 * torch.randn(N, 1, dtype=torch.float64)
    end = reverse_ve(lambda z, s: -z / s**2, x, sigmas)
    mean_square = 100.0
    for k in range(50):
        change = (sigmas[k] ** 2 - sigmas[k + 1] ** 2).item()
        mean_square = (1 - change / sigmas[k].item() ** 2) ** 2 * mean_square + (change if k < 49 else 0)
    assert end.square().mean().item() == pytest.approx(mean_square, abs=5 * mean_square * (2 / N) ** 0.5)


def test_reverse_ve_samples_a_mixture() -> None:
    """±1 with equal weight plus N(0, 0.1²), from pure noise."""

    def score(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = 0.01 + sigma**2
        return (torch.tanh(z / variance) - z) / variance

    torch.manual_seed(0)
    end = reverse_ve(score, 20.0 * torch.randn(N // 10, 1), exponential_schedule(300, 0.01, 20.0))
    n = N // 10
    assert (end > 0).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    assert end.abs().mean().item() == pytest.approx(1, abs=0.01)
    assert end.abs().std().item() == pytest.approx(0.1, rel=0.1)


def gaussian_score(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Score of N(0, 0.25 I) with noise; its probability flow is x(σ) ∝ √(0.25 + σ²)."""
    return -z / (0.25 + sigma**2)


def test_edm_heun_is_of_second_order_on_a_gaussian() -> None:
    x = 80 * torch.randn(50, 2, dtype=torch.float64)
    exact = x * math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2))
    errors = [
        (edm_heun(gaussian_score, x, karras_schedule(steps)[:-1]) - exact).norm() / exact.norm() for steps in (40, 80)
    ]
    assert errors[1] < 3e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_edm_heun_ends_in_the_denoiser() -> None:
    """The step to σ = 0 is Euler's, and gives z + σ² f, at the price of one evaluation."""
    seen: list[float] = []

    def field(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma.item())
        return gaussian_score(z, sigma)

    z = torch.randn(5, 3)
    end = edm_heun(field, z, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(end, z + 0.25 * gaussian_score(z, torch.tensor(0.5)))
    assert seen == [0.5]


def test_edm_grid_has_equal_steps_of_its_power() -> None:
    grid = karras_schedule(5, 0.01, 10.0, rho=3.0)
    assert grid[[0, 4, 5]].tolist() == pytest.approx([10.0, 0.01, 0.0])
    steps = (grid[:-1] ** (1 / 3)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(4))


@pytest.mark.parametrize(("rtol", "most"), [(1e-3, 1e-1), (1e-6, 1e-4)])
def test_probability_flow_on_a_gaussian(rtol: float, most: float) -> None:
    x = 80 * torch.randn(20, 2, 3, dtype=torch.float64)
    seen: list[float] = []

    def field(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma.item())
        return gaussian_score(z, sigma)

    end = probability_flow(field, x, solver=ODESolver(rtol=rtol, atol=rtol))
    exact = x * math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2))
    assert (end - exact).norm() / exact.norm() < most
    assert min(seen) == pytest.approx(0.002)  # a network knows no σ outside of the range
    assert max(seen) == pytest.approx(80.0)


def test_probability_flow_keeps_single_precision_and_its_start() -> None:
    x = 80 * torch.randn(20, 2)
    kept = x.clone()
    end = probability_flow(gaussian_score, x)
    assert end.dtype == torch.float32
    assert torch.equal(x, kept)
    torch.testing.assert_close(end, x * math.sqrt(0.25 / (0.25 + 80**2)), rtol=2e-3, atol=1e-4)


def test_predictor_corrector_by_hand() -> None:
    """Two steps of Algorithm 3, written out; the last one has neither noise nor corrector."""
    x = 3 * torch.randn(7, 2, dtype=torch.float64)
    sigmas = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    found = predictor_corrector(
        gaussian_score, x, sigmas, signal_to_noise=0.3, generator=torch.Generator().manual_seed(4)
    )
    generator = torch.Generator().manual_seed(4)
    z1, z2 = (torch.randn(7, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    hand = x + 8 * -x / 9.25 + math.sqrt(8) * z1
    f = -hand / 1.25
    epsilon = 2 * (0.3 * z2.norm(dim=1).mean() / f.norm(dim=1).mean()) ** 2
    hand = hand + epsilon * f + (2 * epsilon).sqrt() * z2
    hand = hand + 0.75 * -hand / 1.25
    torch.testing.assert_close(found, hand)


def test_the_corrector_mends_large_steps() -> None:
    """In few steps the predictor's variance is wrong; correcting brings it nearer the truth."""
    torch.manual_seed(0)
    x = 10 * torch.randn(20_000, 2)
    sigmas = exponential_schedule(12, 0.1, 10.0)
    truth = math.sqrt(0.25 + 0.01)
    alone = abs(reverse_ve(gaussian_score, x, sigmas).std().item() - truth)
    corrected = abs(predictor_corrector(gaussian_score, x, sigmas, signal_to_noise=0.5).std().item() - truth)
    assert corrected < 0.7 * alone


def test_samplers_that_need_torchdiffeq_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="probability_flow needs torchdiffeq: pip install torchdiffeq"):
        probability_flow(gaussian_score, torch.ones(2, 2))


def test_grid() -> None:
    grid = exponential_schedule(4, 0.01, 100.0)
    torch.testing.assert_close(grid, torch.tensor([100.0, 10, 1, 0.1, 0.01], dtype=torch.float64))


def test_same_generator_same_samples_and_callbacks_see_every_step() -> None:
    seen: list[int] = []
    draws = [
        reverse_ve(
            lambda z, s: -z,
            torch.ones(3, 2),
            exponential_schedule(5, 0.1, 1.0),
            generator=torch.Generator().manual_seed(2),
            callback=lambda k, x: seen.append(k),
        )
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert seen == [1, 2, 3, 4, 5] * 2


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    x = unadjusted_langevin(lambda z: -weight * z, torch.ones(3, 2), step_size=0.1, num_steps=2)
    assert not x.requires_grad


def test_fields_are_checked_and_starts_kept() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"field must return the shape of its input, \[3, 2\], got \[3, 1\]"):
        unadjusted_langevin(lambda z: z[:, :1], x, step_size=0.1, num_steps=1)
    with pytest.raises(ValueError, match="field must return the shape"):
        reverse_ve(lambda z, s: z[:, :1], x, exponential_schedule(2))
    with pytest.raises(ValueError, match="x must be finite"):
        unadjusted_langevin(lambda z: z, x * torch.nan, step_size=0.1, num_steps=1)
    assert unadjusted_langevin(lambda z: z.double(), x, step_size=0.1, num_steps=1).dtype == torch.float32
    for sampler in (predictor_corrector, edm_heun):
        with pytest.raises(ValueError, match="field must return the shape"):
            sampler(lambda z, s: z[:, :1], x, exponential_schedule(2))
    with pytest.raises(ValueError, match=r"probability_flow: 0 < sigma_min < sigma_max must hold, got 2.0 and 1.0"):
        probability_flow(lambda z, s: z, x, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="predictor_corrector: signal_to_noise must be a positive number"):
        predictor_corrector(lambda z, s: z, x, exponential_schedule(2), signal_to_noise=0.0)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_bad_step(step: float) -> None:
    with pytest.raises(ValueError, match="step_size must be a positive number"):
        unadjusted_langevin(lambda z: z, torch.ones(2, 2), step_size=step, num_steps=1)


@pytest.mark.parametrize("sigmas", [torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0]])])
def test_bad_levels(sigmas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sigmas must be at least two decreasing"):
        reverse_ve(lambda z, s: z, torch.ones(2, 2), sigmas)


def test_a_field_that_turns_nan_ends_the_adaptive_solver_with_its_sigma() -> None:
    with pytest.raises(RuntimeError, match=r"probability_flow: no step meets .* at sigma .* is the field finite"):
        probability_flow(lambda z, s: z * torch.nan, torch.ones(2, 2))


@pytest.mark.parametrize("x", [torch.ones(()), torch.ones(3)])
def test_samples_without_an_event(x: torch.Tensor) -> None:
    for sampler in (reverse_ve, predictor_corrector, edm_heun):
        with pytest.raises(ValueError, match=rf"{sampler.__name__}: x must have shape \[N, \*event\], got"):
            sampler(gaussian_score, x, exponential_schedule(2))
    with pytest.raises(ValueError, match="probability_flow: x must have shape"):
        probability_flow(gaussian_score, x)


def test_solver_is_an_object() -> None:
    with pytest.raises(TypeError, match="probability_flow: solver must be an ODESolver, got 'dopri5'"):
        probability_flow(gaussian_score, torch.ones(2, 2), solver="dopri5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: unadjusted_langevin(lambda z: f(z, 1.0), x, step_size=0.1, num_steps=1, generator=0),
        lambda f, x: reverse_ve(f, x, exponential_schedule(3), generator=0),
        lambda f, x: predictor_corrector(f, x, exponential_schedule(3), generator=0),
        lambda f, x: log_likelihood(f, x, generator=0),
    ],
)
def test_a_seed_in_place_of_a_generator_is_refused(call: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, such as .*manual_seed\(0\), got 0"):
        call(lambda z, sigma: -z, torch.zeros(2, 2))
