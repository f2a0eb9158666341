"""Loss modules against the loss functions: values, gradients, what is logged, and what an optimizer sees."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fluxkernels import philox
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    FluxMatching,
    FluxOptions,
    LearnedHorizon,
    LogNormalNoise,
    LogUniformNoise,
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
from fluxmatching.losses.modules import draw_from
from tests.support.problems import smooth_field

F64 = torch.float64


class NoisyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = smooth_field(2)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.net(z) / sigma.reshape(-1, 1)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def test_flux_matching(backend: str) -> None:
    field, x = smooth_field(2), torch.randn(8, 2, dtype=F64)
    options = FluxOptions(estimator="single_chain", divergence="exact")
    module = FluxMatching(field, 0.7, options, refs=2 * x)
    loss, logged = module(x, seed=3)
    expected = flux_matching_loss(field, x, 0.7, options, refs=2 * x, seed=3).mean()
    assert torch.equal(loss, expected)
    assert set(logged) == {"loss", "tau", "effective_centers"}
    assert torch.equal(logged["loss"], loss.detach())
    assert not any(value.requires_grad for value in logged.values())
    for got, want in zip(gradients(loss, field), gradients(expected, field), strict=True):
        assert torch.equal(got, want)


def test_noise_annealed_flux_matching(backend: str) -> None:
    field, normalizer, horizon = NoisyNetwork(), LossNormalizer(8).double(), LearnedHorizon(8).double()
    options, x, noise = FluxOptions(horizon=horizon), torch.randn(8, 2, dtype=F64), LogUniformNoise(0.1, 2.0)
    sigma = draw_from(noise, torch.tensor(4), x, philox.NOISE_LEVEL)
    module = NoiseAnnealedFluxMatching(field, noise, options, normalizer=normalizer)
    assert {id(p) for p in module.parameters()} == {
        id(p) for part in (field, normalizer, horizon) for p in part.parameters()
    }
    loss, logged = module(x, seed=4)
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
    loss, logged = DenoisingScoreMatching(field, 0.7, options)(x, seed=3)
    assert torch.equal(loss, dsm_loss(field, x, 0.7, options, seed=3).mean())
    assert set(logged) == {"loss", "dsm", "sigma"}


@pytest.mark.parametrize("per_sample", [False, True, None])
def test_score_matching_over_noise_levels(per_sample: bool | None, backend: str) -> None:
    """One σ per minibatch or per sample; by default what the field declares."""
    field, normalizer, x = NoisyNetwork(), LossNormalizer(8).double(), torch.randn(8, 2, dtype=F64)
    noise, options = LogUniformNoise(0.1, 2.0), DSMOptions()
    module = DenoisingScoreMatching(field, noise, options, normalizer=normalizer, sigma_per_sample=per_sample)
    loss, _ = module(x, seed=3)
    sigma = draw_from(noise, torch.tensor(3), x, philox.NOISE_LEVEL, 8 if per_sample else 1)
    expected = dsm_loss(lambda z: field(z, sigma), x, sigma, options, seed=3)
    assert torch.equal(loss, normalizer(expected, sigma).mean())
    field.accepts_sigma_per_sample = True
    compiled = torch.compile(nn.DataParallel(field), backend="eager")
    for declared in (field, nn.DataParallel(field), compiled):
        assert DenoisingScoreMatching(declared, noise).sigma_per_sample is True


@pytest.mark.parametrize("noise", [LogNormalNoise(-1.0, 0.5), LogUniformNoise(0.1, 2.0)])
def test_noise_levels_of_seeds_follow_their_distribution(noise: Any) -> None:
    """The quantiles of the samples that the distribution draws itself."""
    x = torch.zeros(1, 2)
    drawn = torch.stack([draw_from(noise, torch.tensor(seed), x, philox.NOISE_LEVEL) for seed in range(2000)])
    uniform = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(drawn.quantile(uniform), noise.quantile(uniform), rtol=0.1, atol=0.0)
    own = noise.sample((20000,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own.quantile(uniform), noise.quantile(uniform), rtol=0.05, atol=0.0)


def test_a_seed_fixes_everything_and_none_draws_anew() -> None:
    module, x = NoiseAnnealedFluxMatching(NoisyNetwork()), torch.randn(8, 2, dtype=F64)
    assert torch.equal(module(x, seed=1)[0], module(x, seed=torch.tensor(1))[0])
    assert not torch.equal(module(x, seed=1)[0], module(x, seed=2)[0])
    torch.manual_seed(0)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(0)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(first, second)


def test_reference_points_are_given_or_the_newest_samples() -> None:
    field, options = smooth_field(2), FluxOptions()
    batches = [torch.randn(8, 2, dtype=F64) for _ in range(4)]
    module = FluxMatching(field, 0.7, options, refs=20)
    for k, x in enumerate(batches):
        refs = torch.cat(batches[k::-1])[:20]
        expected = flux_matching_loss(field, x, 0.7, options, refs=refs, seed=k).mean()
        assert torch.equal(module(x, seed=k)[0], expected)
    copied = FluxMatching(smooth_field(2), 0.7, options, refs=20)
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied.refs.newest, module.refs.newest)
    few = FluxMatching(field, 0.7, options, refs=3)  # fewer than a minibatch: the minibatch
    assert torch.equal(few(batches[0], seed=1)[0], FluxMatching(field, 0.7, options)(batches[0], seed=1)[0])


def test_a_reference_set_keeps_samples_of_the_training_only() -> None:
    field, first, second = smooth_field(2), torch.randn(8, 2, dtype=F64), torch.randn(8, 2, dtype=F64)
    module = FluxMatching(field, 0.7, refs=20)
    module(first, seed=1)
    with pytest.raises(ValueError, match="x must be finite"):
        module(torch.full_like(first, float("nan")), seed=1)
    assert torch.equal(module.refs.newest, first)
    module.eval()
    expected = flux_matching_loss(field, second, 0.7, refs=torch.cat([second, first]), seed=2).mean()
    assert torch.equal(module(second, seed=2)[0], expected)
    assert torch.equal(module.refs.newest, first)
    with pytest.raises(ValueError, match=r"x must have the event of the samples before it, \[2\], got shape \[8, 3\]"):
        module(torch.randn(8, 3, dtype=F64), seed=1)


def test_fixed_reference_points_move_with_the_module_and_are_not_copied() -> None:
    """No engine sends them, and a moving average shares them."""
    module = FluxMatching(smooth_field(2), 0.7, refs=torch.randn(20, 2, dtype=F64))
    assert not list(module.buffers())
    assert copy.deepcopy(module).refs.points is module.refs.points
    assert module.float().refs.points.dtype == torch.float32
    assert copy.deepcopy(module).to("meta").refs.points.is_meta
    assert not module.refs.points.is_meta


def test_numbers_of_numpy_are_numbers() -> None:
    field, x = smooth_field(2), torch.randn(8, 2, dtype=F64)
    for number in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(FluxMatching(field, number)(x, seed=1)[0], FluxMatching(field, 0.5)(x, seed=1)[0])
        expected = DenoisingScoreMatching(field, 0.5)(x, seed=1)[0]
        assert torch.equal(DenoisingScoreMatching(field, number)(x, seed=1)[0], expected)
    assert FluxMatching(field, 0.7, refs=np.int64(20)).refs.size == 20


@pytest.mark.parametrize("refs", [0, -1, True, 1.5, "all"])
def test_reference_points_of_another_kind_are_refused(refs: Any) -> None:
    with pytest.raises(ValueError, match="refs must be a tensor, a positive number of samples, or None, got"):
        FluxMatching(smooth_field(2), 0.7, refs=refs)


def test_a_noise_distribution_and_samples_are_checked() -> None:
    with pytest.raises(TypeError, match="DenoisingScoreMatching: normalizer must be callable, got int"):
        DenoisingScoreMatching(smooth_field(2), 0.7, normalizer=3)  # type: ignore[arg-type]
    for make in (NoiseAnnealedFluxMatching, DenoisingScoreMatching):
        with pytest.raises(TypeError, match=f"{make.__name__}: noise must be a distribution of σ with a method"):
            make(NoisyNetwork(), object())
        with pytest.raises(TypeError, match=r"noise must be .*, such as LogNormalNoise\(\), got <class"):
            make(NoisyNetwork(), LogNormalNoise)
    with pytest.raises(TypeError, match=r"x must be float32 or float64, got torch\.bfloat16; Fabric's mixed precision"):
        FluxMatching(smooth_field(2), 0.7)(torch.randn(4, 2).bfloat16())


def test_a_module_saves_and_loads_what_it_learns() -> None:
    def make() -> NoiseAnnealedFluxMatching:
        return NoiseAnnealedFluxMatching(NoisyNetwork(), options=FluxOptions(horizon=LearnedHorizon(8)))

    first, second = make(), make()
    names = {name.split(".")[0] for name in first.state_dict()}
    assert names == {"field", "horizon", "normalizer", "refs"}
    nn.init.ones_(first.normalizer.layer.first.weight)
    second.load_state_dict(first.state_dict())
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_field_may_be_a_function(backend: str) -> None:
    loss, _ = FluxMatching(lambda z: -z, 0.7)(torch.randn(8, 2), seed=1)
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
    loss, _ = module(torch.randn(8, 2, dtype=F64), seed=1)
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
            make(lambda z: net(z), 0.7)
    with pytest.raises(TypeError, match=r"NoiseAnnealedFluxMatching: field must be .* a function that uses Sequential"):
        NoiseAnnealedFluxMatching(lambda z, sigma: net(z) / sigma)
    with pytest.raises(TypeError, match="FluxMatching: field must be callable, got float"):
        FluxMatching(0.5, 0.5)  # type: ignore[arg-type]


def test_modules_check_their_options() -> None:
    for module, wrong in (
        (FluxMatching, DSMOptions()),
        (NoiseAnnealedFluxMatching, LossNormalizer(8)),
        (DenoisingScoreMatching, FluxOptions()),
    ):
        with pytest.raises(TypeError, match=f"{module.__name__}: options must be "):
            module(lambda z: -z, LogNormalNoise(), wrong)
    with pytest.raises(ValueError, match="a learned horizon needs NoiseAnnealedFluxMatching"):
        FluxMatching(lambda z: -z, 0.7, FluxOptions(horizon=TruncatedExponentialHorizon(learned=True)))
    for options in (FluxOptions, DSMOptions):
        with pytest.raises(ValueError, match=f"{options.__name__}: backend must be one of 'torch', 'cpu', 'triton'"):
            options(backend="gpu")
