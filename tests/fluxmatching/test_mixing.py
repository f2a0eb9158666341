"""The mixing proxy against a Sinkhorn loop of its own, and against fields whose mixing is known."""

import sys

import pytest
import torch
from torch import Tensor

from fluxkernels import philox
from fluxmatching import LossNormalizer, mixing_loss, sinkhorn_divergence
from tests.support.losses import target_of

F64 = torch.float64


def entropic(x: Tensor, y: Tensor, epsilon: float, iterations: int = 5000) -> Tensor:
    """OT_ε for the cost |x - y|²/2 and equal weights, by plain Sinkhorn updates of both potentials until they rest."""
    cost = (x[:, None] - y[None]).square().sum(-1) / 2
    f, g = cost.new_zeros(len(x)), cost.new_zeros(len(y))
    for _ in range(iterations):
        f = -epsilon * ((g - cost) / epsilon).logsumexp(1) + epsilon * torch.tensor(len(y), dtype=F64).log()
        g = -epsilon * ((f[:, None] - cost) / epsilon).logsumexp(0) + epsilon * torch.tensor(len(x), dtype=F64).log()
    return f.mean() + g.mean()


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 5.0])
def test_sinkhorn_divergence_is_the_converged_one(epsilon: float) -> None:
    x, y = torch.randn(12, 3, dtype=F64), 1.0 + torch.randn(9, 3, dtype=F64)
    exact = entropic(x, y, epsilon) - entropic(x, x, epsilon) / 2 - entropic(y, y, epsilon) / 2
    torch.testing.assert_close(sinkhorn_divergence(x, y, epsilon=epsilon, iterations=200), exact, rtol=2e-2, atol=1e-4)


def test_number_of_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many temperatures as asked, from the squared diameter down to ε, counted where geomloss makes them."""
    from geomloss._legacy import sinkhorn_divergence as module

    seen: list[list[float]] = []
    original = module.epsilon_schedule
    monkeypatch.setattr(module, "epsilon_schedule", lambda *a: seen.append(original(*a)) or seen[-1])
    for iterations in (4, 10, 50):
        sinkhorn_divergence(torch.randn(5, 8), torch.randn(5, 8), iterations=iterations)
    assert [len(temperatures) for temperatures in seen] == [4, 10, 50]
    assert all(temperatures[-1] == pytest.approx(0.05) for temperatures in seen)


def test_shifted_points_cost_half_the_squared_shift() -> None:
    x = 5 * torch.randn(20, 4, dtype=F64)
    shift = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=F64)
    found = sinkhorn_divergence(x, x + shift, epsilon=1e-4, iterations=400)
    torch.testing.assert_close(found, shift.square().sum() / 2, rtol=1e-3, atol=0)
    far = sinkhorn_divergence((x + 1e4).float(), (x + shift + 1e4).float(), epsilon=1e-4, iterations=400)
    assert far.item() == pytest.approx(found.item(), rel=0.05)


def test_equal_sets_and_single_points() -> None:
    x = torch.randn(6, 2)
    assert sinkhorn_divergence(x, x).abs() < 1e-5
    assert sinkhorn_divergence(torch.zeros(1, 2), torch.ones(1, 2)).item() == pytest.approx(1.0)
    assert sinkhorn_divergence(torch.zeros(3, 2), torch.zeros(2, 2)).abs() < 1e-6


def test_mixing_loss_by_hand() -> None:
    x, sigma, seed = torch.randn(8, 3, dtype=F64), 0.7, 11
    field = lambda z, s: -z / (1 + s**2)  # noqa: E731
    found = mixing_loss(field, x, sigma, seed=seed)
    x0 = target_of(lambda z: z, x, sigma, seed=seed).x0
    push, noise = philox.normal(philox.as_seed(seed, x.device), (2, 4, 3), philox.MIXING, F64)
    off = x0[4:] + sigma * push
    h = 0.2 * sigma**2
    mixed = off - h * off / (1 + sigma**2) + (2 * h) ** 0.5 * noise
    hand = sinkhorn_divergence(mixed, x0[:4]) / sinkhorn_divergence(off, x0[:4])
    torch.testing.assert_close(found, hand.expand(8))


def test_fields_that_pull_back_score_lower() -> None:
    torch.manual_seed(0)
    x = torch.zeros(512, 2)
    losses = [
        torch.stack([mixing_loss(lambda z, s, pull=pull: -pull * z / s**2, x, 1.0, seed=k) for k in range(8)]).mean()
        for pull in (-1.0, 0.0, 1.0, 2.0)
    ]
    assert losses == sorted(losses, reverse=True)


def test_gradient_reaches_field_and_normalizer_alone() -> None:
    x = torch.randn(10, 2, requires_grad=True)
    pull = torch.tensor(0.5, requires_grad=True)
    normalizer = LossNormalizer(8)
    found = mixing_loss(lambda z, s: -pull * z, x, 0.5, normalizer, seed=1)
    assert found.shape == (10,)
    assert torch.equal(found, found[:1].expand(10))
    found.mean().backward()
    assert pull.grad is not None
    assert pull.grad.abs() > 0
    assert all(p.grad is not None for p in normalizer.parameters())
    assert x.grad is None
    ratio = mixing_loss(lambda z, s: -pull * z, x, 0.5, seed=1)
    torch.testing.assert_close(found, normalizer(ratio, torch.tensor(0.5)))


def test_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(12, 2, dtype=F64)

    def loss(pull: Tensor) -> Tensor:
        return mixing_loss(lambda z, s: -pull * z, x, 0.5, seed=2, iterations=300).mean()

    pull = torch.tensor(0.5, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(pull), pull)
    finite = (loss(pull.detach() + 1e-4) - loss(pull.detach() - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, finite, rtol=2e-2, atol=0)  # the gradient supposes converged potentials


def test_tiny_noise_and_autocast_stay_finite() -> None:
    x = torch.randn(8, 3, 4, 4)
    assert mixing_loss(lambda z, s: -z / s**2, x, 1e-5).isfinite().all()
    same = torch.zeros(8, 3, 4, 4)
    for sigma in (1e-4, 1e-20):  # before and after are rounding alone
        assert (mixing_loss(lambda z, s: 0 * z, same, sigma) == 1).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixing_loss(lambda z, s: -z, x, 0.5, seed=3)
    torch.testing.assert_close(half, mixing_loss(lambda z, s: -z, x, 0.5, seed=3))


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 2)
    field = lambda z, s: -z  # noqa: E731
    for bad, text in (
        ((x[:3], 0.5, {}), "x must have at least 4 samples, got 3"),
        ((x, torch.ones(8), {}), r"sigma must be one number, got shape \[8\]"),
        ((x, 0.5, {"epsilon": 0.0}), "epsilon must be a positive number"),
        ((x, 0.5, {"iterations": 3}), "iterations must be at least 4, got 3"),
        ((x, 0.5, {"step_size": -1.0}), "step_size must be a positive number"),
        ((x * torch.nan, 0.5, {}), "x must be finite"),
    ):
        with pytest.raises(ValueError, match=text):
            mixing_loss(field, bad[0], bad[1], **bad[2])
    with pytest.raises(ValueError, match="x and y must be samples of one shape"):
        sinkhorn_divergence(x, torch.randn(8, 3))
    with pytest.raises(ValueError, match="mixing_loss: field must be finite"):
        mixing_loss(lambda z, s: z * torch.nan, x, 0.5)
    monkeypatch.setitem(sys.modules, "geomloss", None)
    with pytest.raises(ImportError, match="sinkhorn_divergence needs geomloss: pip install geomloss"):
        mixing_loss(field, x, 0.5)


def test_gradients_stay_off_where_they_were() -> None:
    with torch.no_grad():
        mixing_loss(lambda z, s: -z, torch.randn(8, 2), 0.5)
        assert not torch.is_grad_enabled()
