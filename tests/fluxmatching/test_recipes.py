"""Each recipe against its formula with all pairs at once in float64."""

import pytest
import torch
from torch import Tensor

from fluxmatching import marginal_velocity
from fluxmatching.recipes import (
    drifting_field,
    flow_matching_target,
    kernel_stein_discrepancy,
    mean_shift,
    stable_target_field,
    svgd_step,
)
from tests.support import published

F64 = torch.float64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("D", [2, 40])
@pytest.mark.parametrize("own", [True, False])
def test_drifting_field(own: bool, D: int, backend: str) -> None:
    x, positives, negatives = normal(3, 20, D), normal(3, 31, D) + 1, normal(3, 20, D)
    bandwidths = (0.7, 2.0)
    got = drifting_field(x, positives, None if own else negatives, bandwidths)
    for group in range(3):
        others = None if own else negatives[group]
        expected = sum(published.drifting_field(x[group], positives[group], others, b) for b in bandwidths)
        torch.testing.assert_close(got[group], expected, rtol=1e-8, atol=1e-10)


def test_drift_vanishes_where_distributions_are_equal(backend: str) -> None:
    x = normal(50, 2)
    assert drifting_field(x, x, x, (0.5,)).abs().max() < 1e-12


def test_svgd_step(backend: str) -> None:
    x, score, sigma = normal(2, 30, 3) + 5, normal(2, 30, 3), 0.8
    difference = x.unsqueeze(-2) - x.unsqueeze(-3)
    k = (-difference.square().sum(-1) / (2 * sigma**2)).exp()
    expected = (k @ score + (k.unsqueeze(-1) * difference).sum(-2) / sigma**2) / 30
    torch.testing.assert_close(svgd_step(x, score, sigma), expected, rtol=1e-10, atol=1e-12)


def test_kernel_stein_discrepancy(backend: str) -> None:
    x, score, sigma = normal(2, 30, 3) + 5, normal(2, 30, 3), 1.3
    difference = x.unsqueeze(-2) - x.unsqueeze(-3)
    squares = difference.square().sum(-1)
    k = (-squares / (2 * sigma**2)).exp()
    between = ((score.unsqueeze(-2) - score.unsqueeze(-3)) * difference).sum(-1)
    pairs = k * (score @ score.mT + (between + 3) / sigma**2 - squares / sigma**4)
    expected = (pairs.sum((-1, -2)) - pairs.diagonal(dim1=-2, dim2=-1).sum(-1)) / (30 * 29)
    torch.testing.assert_close(kernel_stein_discrepancy(x, score, sigma), expected, rtol=1e-9, atol=1e-12)


def test_kernel_stein_discrepancy_finds_a_wrong_distribution() -> None:
    x = normal(400, 2)
    right, wrong = kernel_stein_discrepancy(x, -x, 1.0), kernel_stein_discrepancy(1.5 * x, -1.5 * x, 1.0)
    assert right.abs() < 0.02
    assert wrong > 5 * right.abs()


def test_mean_shift_finds_the_modes(backend: str) -> None:
    centers = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=F64)
    refs = centers.repeat_interleave(60, 0) + 0.3 * normal(120, 2)
    found, arrived = mean_shift(refs[::7], refs, 1.0)
    assert arrived.all()
    assert torch.cdist(found, centers).amin(1).max() < 0.2
    # A single point of great weight is a mode itself.
    heavy = torch.zeros(120, dtype=F64).index_fill(0, torch.tensor([3]), 20.0)
    found, _ = mean_shift(refs[:60], refs, 1.0, log_weights=heavy)
    torch.testing.assert_close(found, refs[3].expand(60, 2), rtol=0, atol=1e-3)


def test_mean_shift_returns_which_points_have_not_arrived() -> None:
    refs = normal(50, 2)
    _, arrived = mean_shift(refs + 3, refs, 0.5, max_steps=1)
    assert not arrived.any()


def test_flow_matching_target(backend: str) -> None:
    x, data, t = normal(9, 4), normal(25, 4), torch.linspace(0.05, 0.95, 9, dtype=F64)
    torch.testing.assert_close(flow_matching_target(x, t, data), marginal_velocity(x, t, data), rtol=1e-9, atol=1e-9)
    half = torch.where(torch.arange(25) < 12, 0.0, -torch.inf).to(F64)
    torch.testing.assert_close(
        flow_matching_target(x, t, data, log_weights=half), marginal_velocity(x, t, data[:12]), rtol=1e-9, atol=1e-9
    )


def test_stable_target_field(backend: str) -> None:
    clean, sigma = normal(7, 1, 2, 3), torch.rand(7, dtype=F64) + 0.2
    z, refs = clean + sigma.view(-1, 1, 1, 1) * normal(7, 1, 2, 3), torch.cat([clean, normal(20, 1, 2, 3)])
    squares = (z.unsqueeze(1) - refs).square().flatten(2).sum(-1)
    expected = ((-squares / (2 * sigma.square().unsqueeze(1))).softmax(1) @ refs.flatten(1)).reshape(z.shape)
    torch.testing.assert_close(stable_target_field(z, sigma, refs), expected, rtol=1e-10, atol=1e-12)


def test_far_particles_in_float32() -> None:
    """Clusters that are thousands of bandwidths apart, and an offset of the same size."""
    centers = torch.tensor([[0.0, 0.0], [1000.0, 0.0]]).repeat_interleave(20, 0)
    x = centers + 0.1 * torch.randn(40, 2)
    score = -(x - centers) / 0.01
    for recipe in (svgd_step, kernel_stein_discrepancy):
        got, exact = recipe(x, score, 0.1), recipe(x.double(), score.double(), 0.1)
        assert got.dtype == torch.float32
        assert (got.double() - exact).norm() < 1e-5 * exact.norm()
    near, data = torch.randn(30, 2), torch.randn(30, 2)
    got, exact = (
        drifting_field(near + 1000, data + 1000, bandwidths=(0.5,)),
        drifting_field((near + 1000).double(), (data + 1000).double(), bandwidths=(0.5,)),
    )
    assert (got.double() - exact).norm() < 1e-5 * exact.norm()
    found, arrived = mean_shift(data + 1000, data + 1000, 0.5)
    assert arrived.all()
    modes, _ = mean_shift((data + 1000).double(), (data + 1000).double(), 0.5)
    assert (found.double() - modes).abs().max() < 2e-3


def test_bad_input() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="drifting_field: bandwidths must be a positive number, got -1"):
        drifting_field(x, x, bandwidths=(-1.0,))
    with pytest.raises(ValueError, match="svgd_step: score must have the shape of x"):
        svgd_step(x, x[:3], 1.0)
    with pytest.raises(ValueError, match="kernel_stein_discrepancy: sigma must be a positive number"):
        kernel_stein_discrepancy(x, x, 0.0)
    with pytest.raises(ValueError, match="mean_shift: max_steps must be a positive integer"):
        mean_shift(x, x, 1.0, max_steps=0)
    with pytest.raises(ValueError, match="drifting_field: x must have more than one sample"):
        drifting_field(x[:1], x)
    for bandwidths in ((), 0.5):
        with pytest.raises(ValueError, match="drifting_field: bandwidths must be a sequence of one or more numbers"):
            drifting_field(x, x, bandwidths=bandwidths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel_stein_discrepancy: x must have more than one sample"):
        kernel_stein_discrepancy(x[:1], x[:1], 1.0)
    with pytest.raises(TypeError, match=r"svgd_step: x must be a torch\.Tensor, got list"):
        svgd_step([[0.0]], x, 1.0)  # type: ignore[arg-type]
    for time in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="flow_matching_target: t must"):
            flow_matching_target(x, time, x)
    with pytest.raises(ValueError, match="stable_target_field: sigma must be a positive finite number"):
        stable_target_field(x, -1.0, x)
    with pytest.raises(ValueError, match="stable_target_field: refs must have shape"):
        stable_target_field(x, 1.0, torch.randn(7, 3))
