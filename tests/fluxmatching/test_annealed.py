"""The noise-annealed loss against the loss at one noise level (Eq. 11)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fluxmatching import Draws, LearnedHorizon, LossNormalizer, TruncatedExponentialHorizon, UniformHorizon
from tests.support.losses import annealed_loss, flux_loss
from tests.support.problems import smooth_field

F64 = torch.float64


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


def test_sigma_is_one_number() -> None:
    with pytest.raises(ValueError, match="sigma must be one number"):
        annealed_loss(lambda z, s: z, torch.randn(4, 2), torch.ones(4), LossNormalizer())


def _at(horizon: LearnedHorizon, sigma: Tensor) -> TruncatedExponentialHorizon:
    return TruncatedExponentialHorizon(horizon.rate(sigma, sigma).item()).double()
