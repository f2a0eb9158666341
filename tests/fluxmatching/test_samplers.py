"""Samplers against processes whose moments are known at every step."""

import math

import pytest
import torch

from fluxmatching import log_sigma_grid, reverse_ve, unadjusted_langevin

N = 100_000


def test_unadjusted_langevin_on_a_gaussian() -> None:
    """x ← (1-η)x + √(2η)ξ has variance 1/(1-η/2) in the end: the step's own bias included."""
    generator = torch.Generator().manual_seed(1)
    x = unadjusted_langevin(lambda z: -z, torch.full((N, 2), 5.0), step=0.1, steps=120, generator=generator)
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
        step=step,
        steps=400,
        callback=lambda k, x: kept.append(x),
    )
    # E|x'|² = |1 + η A|² E|x|² + 2ηD with A = -1 ± 2i: stationary variance 2η/(1 - (1-η)² - 4η²).
    variance = 2 * step / (1 - (1 - step) ** 2 - 4 * step**2)
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * (4 / N) ** 0.5 + 0.005)
    circulation = (kept[-2][:, 0] * kept[-1][:, 1] - kept[-2][:, 1] * kept[-1][:, 0]).mean().item() / step
    assert circulation == pytest.approx(4 * variance, rel=0.1)


def test_reverse_ve_on_a_point() -> None:
    """Data at one point: the score is -x/σ², and each update's mean and variance are known."""
    sigmas = log_sigma_grid(50, 0.01, 10.0)
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
    end = reverse_ve(score, 20.0 * torch.randn(N // 10, 1), log_sigma_grid(300, 0.01, 20.0))
    n = N // 10
    assert (end > 0).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    assert end.abs().mean().item() == pytest.approx(1, abs=0.01)
    assert end.abs().std().item() == pytest.approx(0.1, rel=0.1)


def test_grid() -> None:
    grid = log_sigma_grid(4, 0.01, 100.0)
    torch.testing.assert_close(grid, torch.tensor([100.0, 10, 1, 0.1, 0.01], dtype=torch.float64))


def test_same_generator_same_samples_and_callbacks_see_every_step() -> None:
    seen: list[int] = []
    draws = [
        reverse_ve(
            lambda z, s: -z,
            torch.ones(3, 2),
            log_sigma_grid(5, 0.1, 1.0),
            generator=torch.Generator().manual_seed(2),
            callback=lambda k, x: seen.append(k),
        )
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert seen == [1, 2, 3, 4, 5] * 2


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    x = unadjusted_langevin(lambda z: -weight * z, torch.ones(3, 2), step=0.1, steps=2)
    assert not x.requires_grad


def test_fields_are_checked_and_starts_kept() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"field must return the shape of its input, \[3, 2\], got \[3, 1\]"):
        unadjusted_langevin(lambda z: z[:, :1], x, step=0.1, steps=1)
    with pytest.raises(ValueError, match="field must return the shape"):
        reverse_ve(lambda z, s: z[:, :1], x, log_sigma_grid(2))
    with pytest.raises(ValueError, match="x must be finite"):
        unadjusted_langevin(lambda z: z, x * torch.nan, step=0.1, steps=1)
    assert unadjusted_langevin(lambda z: z.double(), x, step=0.1, steps=1).dtype == torch.float32


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_bad_step(step: float) -> None:
    with pytest.raises(ValueError, match="step must be a positive number"):
        unadjusted_langevin(lambda z: z, torch.ones(2, 2), step=step, steps=1)


@pytest.mark.parametrize("sigmas", [torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0]])])
def test_bad_levels(sigmas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sigmas must be at least two decreasing"):
        reverse_ve(lambda z, s: z, torch.ones(2, 2), sigmas)
