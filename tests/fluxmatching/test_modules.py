"""Loss modules against the loss functions: values, gradients, what is logged, and what an optimizer sees."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    TruncatedExponentialHorizon,
    dsm_loss,
    field_from_denoiser,
    field_from_noise_prediction,
    field_from_velocity,
    flux_matching_loss,
    noise_annealed_flux_loss,
)
from fluxmatching.fields import NoisyField
from fluxmatching.losses.annealed import annealed_terms
from tests.support.problems import smooth_field

F64 = torch.float64


class NoisyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = smooth_field(2)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.net(z) / sigma


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def test_flux_matching(backend: str) -> None:
    field, x = smooth_field(2), torch.randn(8, 2, dtype=F64)
    options = FluxOptions(estimator="single_chain", divergence="exact")
    module = FluxMatching(field, options)
    loss, logged = module(x, 0.7, refs=2 * x, seed=3)
    expected = flux_matching_loss(field, x, 0.7, options, refs=2 * x, seed=3).mean()
    assert torch.equal(loss, expected)
    assert set(logged) == {"loss", "tau"}
    assert torch.equal(logged["loss"], loss.detach())
    assert not any(value.requires_grad for value in logged.values())
    for got, want in zip(gradients(loss, field), gradients(expected, field), strict=True):
        assert torch.equal(got, want)


def test_noise_annealed_flux_matching(backend: str) -> None:
    field, normalizer, horizon = NoisyNetwork(), LossNormalizer(8).double(), LearnedHorizon(8).double()
    options, x, sigma = FluxOptions(horizon=horizon), torch.randn(8, 2, dtype=F64), torch.tensor(0.7, dtype=F64)
    module = NoiseAnnealedFluxMatching(field, options, normalizer=normalizer)
    assert {id(p) for p in module.parameters()} == {
        id(p) for part in (field, normalizer, horizon) for p in part.parameters()
    }
    loss, logged = module(x, sigma, seed=4)
    expected = noise_annealed_flux_loss(field, x, sigma, normalizer, options, seed=4)
    assert expected.shape == (8,)
    assert torch.equal(loss, expected.mean())
    terms = annealed_terms(field, x, sigma, normalizer, options, seed=4)
    assert torch.equal(logged["flux"], terms.flux.mean())
    assert torch.equal(logged["tau"], terms.tau)
    assert torch.equal(logged["sigma"], sigma)
    assert not any(value.requires_grad for value in logged.values())
    for got, want in zip(gradients(loss, module), gradients(expected.mean(), module), strict=True):
        assert torch.equal(got, want)


def test_denoising_score_matching(backend: str) -> None:
    field, x = smooth_field(2), torch.randn(8, 2, dtype=F64)
    options = DSMOptions(form="x0", stable=False)
    loss, logged = DenoisingScoreMatching(field, options)(x, 0.7, seed=3)
    assert torch.equal(loss, dsm_loss(field, x, 0.7, options, seed=3).mean())
    assert set(logged) == {"loss"}


def test_a_module_saves_and_loads_what_it_learns() -> None:
    def make() -> NoiseAnnealedFluxMatching:
        return NoiseAnnealedFluxMatching(NoisyNetwork(), FluxOptions(horizon=LearnedHorizon(8)))

    first, second = make(), make()
    names = {name.split(".")[0] for name in first.state_dict()}
    assert names == {"field", "horizon", "normalizer"}
    nn.init.ones_(first.normalizer.layer.first.weight)
    second.load_state_dict(first.state_dict())
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_field_may_be_a_function(backend: str) -> None:
    loss, _ = FluxMatching(lambda z: -z)(torch.randn(8, 2), 0.7, seed=1)
    assert loss.ndim == 0


@pytest.mark.parametrize("options", [0.5, None, {"divergence": "exact"}, DSMOptions()])
def test_other_options_are_refused(options: Any) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(TypeError, match="flux_matching_loss: options must be FluxOptions, got "):
        flux_matching_loss(lambda z: -z, x, 0.5, options)
    with pytest.raises(TypeError, match="noise_annealed_flux_loss: options must be FluxOptions, got "):
        noise_annealed_flux_loss(lambda z, s: -z, x, 0.5, LossNormalizer(), options)
    with pytest.raises(TypeError, match="dsm_loss: options must be DSMOptions, got FluxOptions"):
        dsm_loss(lambda z: -z, x, 0.5, FluxOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize("adapt", [field_from_denoiser, field_from_noise_prediction, field_from_velocity])
def test_networks_inside_adapters_train_copy_and_save(adapt: Callable[[NoisyField], nn.Module], backend: str) -> None:
    module = NoiseAnnealedFluxMatching(adapt(NoisyNetwork()), normalizer=LossNormalizer(8).double())
    assert any(name.startswith("field.prediction.net") for name, _ in module.named_parameters())
    loss, _ = module(torch.randn(8, 2, dtype=F64), 0.7, seed=1)
    assert all(g.abs().sum() > 0 for g in gradients(loss, module.field))
    copied = copy.deepcopy(module)
    nn.init.zeros_(copied.field.prediction.net[0].weight)
    assert module.field.prediction.net[0].weight.abs().sum() > 0
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for p, q in zip(module.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_function_that_hides_a_network_is_refused() -> None:
    net = smooth_field(2)
    for make in (FluxMatching, DenoisingScoreMatching):
        with pytest.raises(
            TypeError, match=r"field must be a torch\.nn\.Module, so that its parameters are registered"
        ):
            make(lambda z: net(z))
    with pytest.raises(TypeError, match=r"NoiseAnnealedFluxMatching: field must be .* a function that uses Sequential"):
        NoiseAnnealedFluxMatching(lambda z, sigma: net(z) / sigma)
    with pytest.raises(TypeError, match="FluxMatching: field must be callable, got float"):
        FluxMatching(0.5)  # type: ignore[arg-type]


def test_modules_check_their_options() -> None:
    for module, wrong in (
        (FluxMatching, DSMOptions()),
        (NoiseAnnealedFluxMatching, LossNormalizer(8)),
        (DenoisingScoreMatching, FluxOptions()),
    ):
        with pytest.raises(TypeError, match=f"{module.__name__}: options must be "):
            module(lambda z: -z, wrong)
    with pytest.raises(ValueError, match="a learned horizon needs NoiseAnnealedFluxMatching"):
        FluxMatching(lambda z: -z, FluxOptions(horizon=TruncatedExponentialHorizon(learned=True)))
    for options in (FluxOptions, DSMOptions):
        with pytest.raises(ValueError, match=f"{options.__name__}: backend must be one of 'torch', 'cpu', 'triton'"):
            options(backend="gpu")
