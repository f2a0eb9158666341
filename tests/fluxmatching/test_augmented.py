"""A field added to a frozen score model: values, gradients, and every sampler and loss that takes it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fluxmatching import (
    AugmentedField,
    EDMField,
    FluxMatching,
    LogUniformNoise,
    NoiseAnnealedFluxMatching,
    edm_heun,
    exponential_schedule,
    flux_matching_loss,
    predictor_corrector,
    probability_flow,
    reverse_ve,
    step_defect_loss,
    unadjusted_langevin,
)


class Network(nn.Module):
    """f(z) or f(z, σ), with a dropout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()

    def forward(self, z: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
        return self.layers(z) / sigma


X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = exponential_schedule(3, 0.1, 2.0)


def score_of_normal(z: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
    return -z / (1 + sigma**2)


def turned_score(z: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
    s = score_of_normal(z, sigma)
    return torch.stack([-s[:, 1], s[:, 0]], 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_it_is_the_sum_with_and_without_sigma(scale: float) -> None:
    score, v = Network(0).eval(), Network(1).eval()
    field = AugmentedField(score, v, scale)
    torch.testing.assert_close(field(X), score(X) + scale * v(X))
    for sigma in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(field(X, sigma), score(X, sigma) + scale * v(X, sigma))


def test_the_score_model_is_frozen_and_v_is_not() -> None:
    score, v = Network(0), Network(1)
    field = AugmentedField(score, v)
    field.train()
    assert field.training
    assert v.training
    assert not score.training
    assert not any(p.requires_grad for p in score.parameters())
    field(X).square().sum().backward()
    step_defect_loss(field, X, 0.1).mean().backward()
    assert all(p.grad is None for p in score.parameters())
    assert all(p.grad is not None for p in v.parameters())
    # Dropout of the score model is off, so that its part is the same in every call.
    torch.testing.assert_close(AugmentedField(score, v, 0.0)(X), score(X))


def test_derivatives_in_z_go_through_both_parts() -> None:
    field = AugmentedField(Network(0), Network(1).eval(), 2.0).eval()
    z = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(field(z).sum(), z)
    parts = [torch.autograd.grad(part(z).sum(), z)[0] for part in (field.score_model, field.v)]
    torch.testing.assert_close(found, parts[0] + 2 * parts[1])


SAMPLERS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "langevin": lambda f: unadjusted_langevin(
        lambda z: f(z, 0.5), X, step_size=0.1, num_steps=3, generator=torch.Generator().manual_seed(1)
    ),
    "reverse": lambda f: reverse_ve(f, X, SIGMAS, generator=torch.Generator().manual_seed(1)),
    "predictor-corrector": lambda f: predictor_corrector(f, X, SIGMAS, generator=torch.Generator().manual_seed(1)),
    "heun": lambda f: edm_heun(f, X, SIGMAS),
    "ode": lambda f: probability_flow(f, X, sigma_max=2.0, sigma_min=0.1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_it_as_they_take_the_sum(name: str) -> None:
    field = AugmentedField(score_of_normal, turned_score)
    wanted = SAMPLERS[name](lambda z, sigma: score_of_normal(z, sigma) + turned_score(z, sigma))
    torch.testing.assert_close(SAMPLERS[name](field), wanted)
    assert (wanted - SAMPLERS[name](score_of_normal)).abs().max() > 1e-3


def test_losses_take_it() -> None:
    field = AugmentedField(Network(0), Network(1)).eval()
    found = flux_matching_loss(field, X, 0.5, seed=1)
    torch.testing.assert_close(found, flux_matching_loss(lambda z: field.score_model(z) + field.v(z), X, 0.5, seed=1))
    loss, _ = FluxMatching(field, 0.5)(X, seed=1)
    loss.backward()
    assert all(p.grad is None for p in field.score_model.parameters())
    assert any(p.grad is not None for p in field.v.parameters())


def test_it_takes_one_sigma_per_sample_if_both_do() -> None:
    def network() -> EDMField:
        return EDMField(lambda z, noise: z * noise[:, None])

    assert AugmentedField(network(), network()).accepts_sigma_per_sample
    assert AugmentedField(score_of_normal, network()).accepts_sigma_per_sample
    assert not AugmentedField(network(), Network(1)).accepts_sigma_per_sample
    assert not AugmentedField(score_of_normal, turned_score).accepts_sigma_per_sample
    both = AugmentedField(network(), network())
    NoiseAnnealedFluxMatching(both, LogUniformNoise(0.1, 2.0))(X.repeat(4, 1)[:16], seed=1)
    sigma = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    one = torch.stack([both(z[None], level)[0] for z, level in zip(X, sigma, strict=True)])
    torch.testing.assert_close(both(X, sigma), one)


NET = Network(3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((None, turned_score), TypeError, "score_model must be callable, got NoneType"),
        ((score_of_normal, 3), TypeError, "v must be callable, got int"),
        ((lambda z: NET(z), turned_score), TypeError, "score_model must be a torch.nn.Module.*Network"),
        ((score_of_normal, lambda z: NET(z)), TypeError, "v must be a torch.nn.Module.*Network"),
        ((score_of_normal, turned_score, float("nan")), ValueError, "scale must be a finite number, got nan"),
        ((score_of_normal, turned_score, "1"), TypeError, "scale must be a finite number, got str"),
        ((score_of_normal, turned_score, True), TypeError, "scale must be a finite number, got bool"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^AugmentedField: {text}"):
        AugmentedField(*arguments)  # type: ignore[arg-type]


def test_parts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="field must return the shape of its input"):
        AugmentedField(score_of_normal, lambda z: z[:, :1])(X)
