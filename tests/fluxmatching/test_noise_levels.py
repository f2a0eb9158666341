"""Noise levels and the learned normalizer."""

import math

import pytest
import torch

from fluxmatching import LogNormalNoise, LogUniformNoise, LossNormalizer


def test_log_normal() -> None:
    n = 200_000
    logs = LogNormalNoise().sample((n,)).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / n**0.5)
    assert logs.std().item() == pytest.approx(1.2, abs=5 * 1.2 / (2 * n) ** 0.5)


def test_log_uniform() -> None:
    sigma = LogUniformNoise(0.01, 10.0).sample((100_000,))
    assert 0.01 <= sigma.min() < 0.0101
    assert 9.9 < sigma.max() <= 10.001
    counts = torch.histc(sigma.log(), 10, math.log(0.01), math.log(10))
    assert (counts - 10_000).abs().max() < 5 * 100


def test_generator_repeats() -> None:
    for noise in (LogNormalNoise(), LogUniformNoise()):
        draws = [noise.sample((3,), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        assert torch.equal(*draws)
        assert noise.sample().shape == ()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_bad_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        LogUniformNoise(low, high)


def test_bad_normalizer_arguments() -> None:
    with pytest.raises(ValueError, match="sigma must be one number or have the shape of loss"):
        LossNormalizer()(torch.ones(4), torch.ones(4, 1))
    with pytest.raises(ValueError, match="hidden must be a positive number"):
        LossNormalizer(0)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_bad_std(std: float) -> None:
    with pytest.raises(ValueError, match="std positive"):
        LogNormalNoise(std=std)


def test_normalizer_learns_the_mean_loss() -> None:
    """Eq. 11 is least where exp(s_η(σ)) is the mean loss at σ; 3 σ² is within reach of an affine map of log σ."""
    torch.manual_seed(0)
    normalizer = LossNormalizer(32)
    optimizer = torch.optim.Adam(normalizer.parameters(), lr=0.02)
    sigma = torch.logspace(-2, 1, 50)
    for _ in range(1500):
        optimizer.zero_grad()
        normalizer(3 * sigma**2, sigma).mean().backward()
        optimizer.step()
    torch.testing.assert_close(normalizer.log_scale(sigma), (3 * sigma**2).log(), rtol=0, atol=0.02)


def test_the_learned_maps_see_a_quarter_of_log_sigma() -> None:
    normalizer = LossNormalizer(1)
    with torch.no_grad():
        for p, value in zip(normalizer.parameters(), (2.0, 0.5, 3.0, 1.0), strict=True):
            p.fill_(value)
    expected = 3 * (2 * math.log(5.0) / 4 + 0.5) + 1
    assert normalizer.log_scale(torch.tensor(5.0)).item() == pytest.approx(expected)


def test_normalizer_keeps_its_digits_under_autocast() -> None:
    torch.manual_seed(0)
    normalizer, sigma = LossNormalizer(), torch.tensor([0.002, 80.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = normalizer.log_scale(sigma)
    assert torch.equal(half, normalizer.log_scale(sigma))
