"""A field added to a frozen score model: values, gradients, and every sampler and loss that takes it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fluxmatching import (
    AugmentedField,
    EDMField,
    FluxMatching,
    LogUniformNoise,
    NoiseAnnealedFluxMatching,
    ODESolver,
    edm_heun,
    exponential_schedule,
    field_from_diffusers,
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


def test_a_copy_of_the_score_model_leaves_the_model_as_it_is() -> None:
    score = Network(0)
    field = AugmentedField(copy.deepcopy(score), Network(1))
    assert score.training
    assert all(p.requires_grad for p in score.parameters())
    torch.testing.assert_close(field.score_model(X), score.eval()(X))


def test_scale_is_a_part_of_the_state() -> None:
    saved = AugmentedField(Network(0), Network(1), 0.25).eval()
    loaded = AugmentedField(Network(2), Network(3)).eval()
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded(X), saved(X))
    another = copy.deepcopy(loaded)
    another.scale.fill_(-1.0)
    assert loaded.scale == 0.25
    torch.testing.assert_close(another(X), another.score_model(X) - another.v(X))


def test_compiled_fields_follow_the_scale() -> None:
    field = AugmentedField(Network(0), Network(1)).eval()
    compiled = torch.compile(field, fullgraph=True, backend="aot_eager")
    for scale in (1.0, -0.5):
        field.scale.fill_(scale)
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), field.score_model(X) + scale * field.v(X))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_distributed_training_waits_for_no_gradient_of_the_score_model() -> None:
    wrapped = DistributedDataParallel(FluxMatching(AugmentedField(Network(0), Network(1)), 0.5))
    for seed in range(2):  # the second step fails if a gradient was missing in the first
        loss, _ = wrapped(X, seed=seed)
        loss.backward()
    assert all(p.grad is not None for p in wrapped.module.field.v.parameters() if p.ndim == 2)


def test_derivatives_in_z_go_through_both_parts() -> None:
    field = AugmentedField(Network(0), Network(1).eval(), 2.0).eval()
    z = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(field(z).sum(), z)
    parts = [torch.autograd.grad(part(z).sum(), z)[0] for part in (field.score_model, field.v)]
    torch.testing.assert_close(found, parts[0] + 2 * parts[1])


SAMPLERS: dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]] = {
    "langevin": lambda f, x: unadjusted_langevin(
        lambda z: f(z, 0.5), x, step_size=0.1, num_steps=3, generator=torch.Generator().manual_seed(1)
    ),
    "reverse": lambda f, x: reverse_ve(f, x, SIGMAS, generator=torch.Generator().manual_seed(1)),
    "predictor-corrector": lambda f, x: predictor_corrector(f, x, SIGMAS, generator=torch.Generator().manual_seed(1)),
    "heun": lambda f, x: edm_heun(f, x, SIGMAS),
    "ode": lambda f, x: probability_flow(f, x, sigma_max=2.0, sigma_min=0.1, solver=ODESolver(rtol=1e-3, atol=1e-3)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_it_as_they_take_the_sum(name: str) -> None:
    field = AugmentedField(score_of_normal, turned_score)
    wanted = SAMPLERS[name](lambda z, sigma: score_of_normal(z, sigma) + turned_score(z, sigma), X)
    torch.testing.assert_close(SAMPLERS[name](field, X), wanted)
    assert (wanted - SAMPLERS[name](score_of_normal, X)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline of diffusers."""
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_a_saved_pipeline_with_a_field_on_it(name: str, pipeline: Path) -> None:
    score, x = field_from_diffusers(pipeline), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    field = AugmentedField(score, lambda z, sigma: z.flip(2) / (1 + sigma**2))
    wanted = SAMPLERS[name](lambda z, sigma: score(z, sigma) + z.flip(2) / (1 + sigma**2), x)
    torch.testing.assert_close(SAMPLERS[name](field, x), wanted)
    assert (wanted - SAMPLERS[name](score, x)).abs().max() > 1e-3


def test_losses_take_it() -> None:
    field = AugmentedField(Network(0), Network(1)).eval()
    found = flux_matching_loss(field, X, 0.5, seed=1)
    torch.testing.assert_close(found, flux_matching_loss(lambda z: field.score_model(z) + field.v(z), X, 0.5, seed=1))
    loss, _ = FluxMatching(field, 0.5)(X, seed=1)
    loss.backward()
    assert all(p.grad is None for p in field.score_model.parameters())
    assert any(p.grad is not None for p in field.v.parameters())


class AtOneLevel(nn.Module):
    def __init__(self, field: nn.Module, sigma: float) -> None:
        super().__init__()
        self.field, self.sigma = field, sigma

    def forward(self, z: Tensor) -> Tensor:
        return self.field(z, self.sigma)


def test_loss_modules_take_a_module_and_refuse_a_function() -> None:
    field = AugmentedField(Network(0), Network(1)).eval()
    loss, _ = FluxMatching(AtOneLevel(field, 0.5), 0.5)(X, seed=1)
    torch.testing.assert_close(loss, flux_matching_loss(lambda z: field(z, 0.5), X, 0.5, seed=1).mean())
    with pytest.raises(TypeError, match=r"FluxMatching: field must be a torch\.nn\.Module"):
        FluxMatching(lambda z: field(z, 0.5), 0.5)


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
