"""The noise-annealed loss against the loss at one noise level (Eq. 11)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxmatching import (
    Draws,
    FluxOptions,
    LearnedHorizon,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    TruncatedExponentialHorizon,
    UniformHorizon,
    flux_target,
)
from tests.support.losses import annealed_loss, flux_loss
from tests.support.problems import smooth_field

F64 = torch.float64


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
def test_a_stratum_is_a_minibatch_with_all_reference_points(
    estimator: str, second_derivatives: str, backend: str
) -> None:
    """Each with its own σ and τ; chunks and a choice of endpoints know which σ belongs to which sample."""
    field, normalizer, x = NoisyNetwork(), LossNormalizer(8).double(), torch.randn(12, 2, dtype=F64)
    sigma, tau = torch.tensor([0.2, 0.7, 3.0], dtype=F64), torch.tensor([0.3, 1.5, 0.8], dtype=F64)
    start, chain = torch.randn(12, 2, dtype=F64), torch.randn(4, 12, 2, dtype=F64)
    probe, chosen = torch.randn(12, 2, dtype=F64).sign(), torch.tensor([0, 3, 5, 9, 11])
    options = {"estimator": estimator, "second_derivatives": second_derivatives}
    draws = Draws(tau, start, chain, probe, chosen)
    together = annealed_loss(field, x, sigma, normalizer, draws=draws, strata=3, chunk_size=2, **options)
    for k in range(3):
        rows = slice(4 * k, 4 * k + 4)
        own = chosen[(chosen >= 4 * k) & (chosen < 4 * k + 4)] - 4 * k
        alone = Draws(tau[k], start[rows], chain[:, rows], probe[rows], own)
        flux = annealed_loss(field, x[rows], sigma[k], normalizer, refs=x, draws=alone, **options).flux
        # The omitted endpoints are weighted by their fraction of the whole minibatch.
        torch.testing.assert_close(together.flux[rows] * (5 / 12), flux * (len(own) / 4), rtol=1e-9, atol=1e-10)


def test_every_stratum_has_a_noise_level_and_a_horizon_of_its_own() -> None:
    """One of each from every equally probable interval, in an order that differs from seed to seed."""
    noise, field = LogUniformNoise(0.01, 1.0), Recording()
    module = NoiseAnnealedFluxMatching(field, noise, FluxOptions(strata=4, horizon=UniformHorizon()))
    orders = set()
    for seed in range(20):
        module(torch.randn(8, 2), seed=seed)
        levels = field.sigma.unflatten(0, (4, 2))
        assert torch.equal(levels[:, 0], levels[:, 1])
        assert sorted(((levels[:, 0].log() / math.log(10) + 2) * 2).floor().tolist()) == [0, 1, 2, 3]
        target = flux_target(
            lambda z: -z, torch.randn(8, 2), 0.5, FluxOptions(strata=4, horizon=UniformHorizon()), seed=seed
        )
        assert sorted(target.tau.floor().tolist()) == [0, 1, 2, 3]
        orders.add(int(target.tau[0]))
    assert orders == {0, 1, 2, 3}


@pytest.mark.parametrize(("samples", "strata"), [(256, 16), (64, 8), (32, 4), (24, 2), (16, 2), (15, 1), (8, 1)])
def test_fields_that_take_a_noise_level_per_sample_get_strata_by_default(samples: int, strata: int) -> None:
    for accepts, expected in ((True, strata), (False, 1)):
        field = Recording()
        field.accepts_sigma_per_sample = accepts
        NoiseAnnealedFluxMatching(field)(torch.randn(samples, 2), seed=1)
        assert len(field.sigma.reshape(-1).unique()) == expected
        assert list(field.sigma.shape) == ([samples] if expected > 1 else [])


class Recording(nn.Module):
    """f(z, σ) = a z that remembers the σ of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-0.5))

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.sigma = sigma
        return self.a * z


class NoisyNetwork(nn.Module):
    """f(z, σ) with second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth_field(2)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.net(z) / sigma.reshape(-1, 1)


@pytest.mark.parametrize(
    ("options", "sigma", "text"),
    [
        ({"strata": 5}, 0.5, "strata must divide the 8 samples of x, got 5"),
        ({"strata": 4}, torch.ones(3), r"sigma must be one number or one per stratum, shape \[4\], got shape \[3\]"),
        ({"strata": 1}, torch.ones(2), r"sigma must be one number, got shape \[2\]"),
    ],
)
def test_strata_that_do_not_fit(options: dict[str, Any], sigma: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        annealed_loss(lambda z, s: -z, torch.randn(8, 2), sigma, LossNormalizer(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"refs": torch.linspace(-1, 1, 12, dtype=F64).reshape(6, 2)},
        {"estimator": "single_chain"},
        {"second_derivatives": "finite_difference"},
        {"divergence": "exact"},
        {"num_steps": 2},
        {"draws": Draws(tau=torch.tensor(2.5, dtype=F64))},
        {"horizon": UniformHorizon(2.0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_loss(options: dict[str, Any], backend: str) -> None:
    net, x, sigma = smooth_field(2), torch.randn(8, 2, dtype=F64), torch.tensor(0.7, dtype=F64)
    annealed = annealed_loss(lambda z, s: net(z), x, sigma, LossNormalizer(), seed=4, **options)
    plain = flux_loss(net, x, sigma, seed=4, **options)
    torch.testing.assert_close(annealed.flux, plain.detach())
    assert not torch.equal(annealed.flux, flux_loss(net, x, sigma, seed=4).detach())


def test_value_and_where_gradients_go(backend: str) -> None:
    field_net, normalizer, horizon = smooth_field(2), LossNormalizer().double(), LearnedHorizon().double()
    x, sigma = torch.randn(8, 2, dtype=F64), torch.tensor(0.7, dtype=F64)

    def field(z: Tensor, s: Tensor) -> Tensor:
        return field_net(z) / s

    loss = annealed_loss(field, x, sigma, normalizer, horizon=horizon, seed=4)
    flux = flux_loss(lambda z: field(z, sigma), x, sigma, horizon=_at(horizon, sigma), seed=4)
    torch.testing.assert_close(loss.flux, flux.detach())
    scale = normalizer.log_scale(sigma)
    expected = flux / scale.exp() + scale
    fit = -(flux / scale.exp()).detach() * horizon.log_density(loss.tau, sigma)
    torch.testing.assert_close(loss.total, expected + fit)
    # Each set of parameters hears its own term alone.
    for module, term in ((field_net, expected), (normalizer, expected), (horizon, fit)):
        parameters = list(module.parameters())
        got = torch.autograd.grad(loss.total.mean(), parameters, retain_graph=True)
        want = torch.autograd.grad(term.mean(), parameters, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_field_and_normalizer_are_called() -> None:
    with pytest.raises(TypeError, match="normalizer must be callable, got NoneType"):
        annealed_loss(lambda z, sigma: -z, torch.randn(4, 2), 0.5, None)  # type: ignore[arg-type]


def _at(horizon: LearnedHorizon, sigma: Tensor) -> TruncatedExponentialHorizon:
    return TruncatedExponentialHorizon(horizon.rate(sigma, sigma).item()).double()
