"""Fields from networks of diffusers: noise levels and predictions against known scores and diffusers' own formulas."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fluxkernels as fk
from fluxmatching import EDMField, field_from_diffusers
from fluxmatching.from_diffusers import DiffusersField

diffusers: Any = pytest.importorskip("diffusers")
F64 = torch.float64
DATA = torch.randn(7, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
KINDS = ("epsilon", "sample", "v_prediction")


def make_unet(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 2,
        "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**options, **changes}).eval()


def log_sigmas(scheduler: Any) -> np.ndarray:
    products = scheduler.alphas_cumprod.double().numpy()
    return np.log(np.sqrt((1 - products) / products))


class ExactPrediction(nn.Module):
    """What a perfect network for data uniform over DATA returns for (x_t, t), t any number."""

    def __init__(self, scheduler: Any, kind: str) -> None:
        super().__init__()
        self.levels, self.kind = log_sigmas(scheduler), kind

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        sigma = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(len(self.levels)), self.levels)))[:, None]
        alpha, std = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        weights = (-(x / alpha - DATA[:, None]).square().sum(-1).T / (2 * sigma**2)).softmax(1)
        clean = weights @ DATA
        noise = (x - alpha * clean) / std
        return SimpleNamespace(sample={"epsilon": noise, "sample": clean}.get(self.kind, alpha * noise - std * clean))


def scheduler_of(kind: str, **options: Any) -> Any:
    return diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type=kind, clip_sample=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_field_is_the_score_at_all_noise_levels(kind: str) -> None:
    """Also between two steps of the scheduler, one σ for all samples and one per sample."""
    scheduler = scheduler_of(kind, beta_end=0.3)
    field = field_from_diffusers(ExactPrediction(scheduler, kind), scheduler)
    levels = log_sigmas(scheduler)
    between = np.exp((levels[:-1] + 0.3 * np.diff(levels))[[3, 20, 40]])
    z = torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    for sigma in (*np.exp(levels[[0, 10, 49]]), *between, torch.logspace(-1, 1, 5, dtype=F64)):
        sigma = torch.as_tensor(sigma)
        wanted = fk.kde_score(z, DATA, sigma.square().expand(5), backend="torch")
        torch.testing.assert_close(field(z, sigma), wanted, rtol=2e-5, atol=2e-5)


def test_steps_and_noise_levels_are_converted_both_ways() -> None:
    scheduler = scheduler_of("epsilon")
    field, levels = field_from_diffusers(make_unet(), scheduler), log_sigmas(scheduler)
    times = torch.tensor([[0.0, 0.25, 7.0], [31.5, 48.9, 49.0]], dtype=F64)
    wanted = np.exp(np.interp(times.numpy(), np.arange(50), levels))
    np.testing.assert_allclose(field.sigmas(times).numpy(), wanted, rtol=1e-5)
    torch.testing.assert_close(field.times(torch.from_numpy(wanted)), times, rtol=0, atol=1e-4)
    # Beyond the first and the last step their times are used.
    beyond = torch.tensor([wanted.min() / 3, wanted.max() * 3])
    torch.testing.assert_close(field.times(beyond), torch.tensor([0.0, 49.0], dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_is_the_one_of_the_scheduler(kind: str) -> None:
    """`step` of diffusers returns its estimate of the clean image."""
    scheduler, unet = scheduler_of(kind), make_unet()
    field = field_from_diffusers(unet, scheduler)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for t in (0, 17, 49):
        product = scheduler.alphas_cumprod[t]
        with torch.no_grad():
            wanted = scheduler.step(unet(x, t).sample, t, x).pred_original_sample
            z, sigma = x / product.sqrt(), ((1 - product) / product).sqrt()
            found = z + sigma**2 * field(z, sigma)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_denoiser_is_the_one_of_an_edm_scheduler(name: str, kind: str) -> None:
    scheduler, unet = getattr(diffusers, name)(sigma_data=0.7, prediction_type=kind), make_unet()
    field = field_from_diffusers(unet, scheduler)
    assert isinstance(field, EDMField)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for sigma in (torch.tensor(0.05), torch.tensor(3.0)):
        with torch.no_grad():
            time = scheduler.precondition_noise(sigma)
            inputs = z * scheduler._get_conditioning_c_in(sigma)
            wanted = scheduler.precondition_outputs(z, unet(inputs, time).sample, sigma)
            torch.testing.assert_close(z + sigma**2 * field(z, sigma), wanted, rtol=1e-4, atol=1e-5)


def test_steps_without_signal_are_left_out() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    field = field_from_diffusers(make_unet(), scheduler)
    assert field.log_sigmas.isfinite().all()
    assert field.times(torch.tensor(1e6)) == 48


@pytest.mark.parametrize("kind", KINDS)
def test_saved_pipelines_networks_and_schedulers_are_read(kind: str, tmp_path: Path) -> None:
    unet, scheduler = make_unet().train(), scheduler_of(kind)
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    z, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 2.0])
    wanted = field_from_diffusers(unet.eval(), scheduler)(z, sigma)
    for field in (
        field_from_diffusers(pipeline),
        field_from_diffusers(str(tmp_path / "pipeline")),
        field_from_diffusers(tmp_path / "unet", tmp_path / "scheduler"),
        field_from_diffusers(tmp_path / "unet", scheduler),
    ):
        assert isinstance(field, DiffusersField)
        assert not field.prediction.training
        torch.testing.assert_close(field(z, sigma), wanted, rtol=0, atol=0)


def test_a_saved_edm_scheduler_is_read(tmp_path: Path) -> None:
    make_unet().save_pretrained(tmp_path / "unet")
    diffusers.EDMEulerScheduler(sigma_data=0.3).save_pretrained(tmp_path / "scheduler")
    field = field_from_diffusers(tmp_path / "unet", tmp_path / "scheduler")
    assert isinstance(field, EDMField)
    assert field.sigma_data == 0.3


def changed(value: Any, **attributes: Any) -> Any:
    """A scheduler with other entries in its config."""
    return SimpleNamespace(alphas_cumprod=value.alphas_cumprod, config=SimpleNamespace(**attributes))


DDPM = scheduler_of("epsilon")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((make_unet(),), TypeError, "model must be a pipeline .*, got UNet2DModel"),
        ((3, DDPM), TypeError, "network must be a torch.nn.Module, got int"),
        ((make_unet(), 3), TypeError, "scheduler must have alphas_cumprod.*got int"),
        ((make_unet(), diffusers.FlowMatchEulerDiscreteScheduler()), TypeError, "got FlowMatchEulerDiscreteScheduler"),
        ((make_unet(), changed(DDPM, prediction_type="flow")), ValueError, "prediction_type .*, got 'flow'"),
        (
            (make_unet(), diffusers.EDMEulerScheduler(prediction_type="sample")),
            ValueError,
            "prediction_type .*'sample'",
        ),
        ((make_unet(), changed(DDPM, timestep_type="continuous")), ValueError, "timestep_type .* got 'continuous'"),
        ((make_unet(), SimpleNamespace(alphas_cumprod=torch.ones(5))), ValueError, "alphas_cumprod .* must fall"),
        ((make_unet(out_channels=2), DDPM), ValueError, "as many output as input channels, got 2 and 1"),
        ((make_unet(num_class_embeds=3), DDPM), ValueError, "must take no class labels, got UNet2DModel"),
        (("nowhere",), FileNotFoundError, "folder of a pipeline must have model_index.json.*nowhere"),
        (("nowhere", DDPM), FileNotFoundError, "folder of a network must have config.json.*nowhere"),
        ((make_unet(), "nowhere"), FileNotFoundError, "must have scheduler_config.json.*nowhere"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^field_from_diffusers: .*{text}"):
        field_from_diffusers(*arguments)


def test_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    make_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(TypeError, match="scheduler must be given with the folder of a network"):
        field_from_diffusers(tmp_path / "unet")
    index = {"_class_name": "LDMPipeline", **{name: ["diffusers", "X"] for name in ("unet", "scheduler", "vqvae")}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must consist of unet and scheduler.*LDMPipeline has scheduler, unet, vqvae"):
        field_from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="must be a UNet2DModel, got UNet2DConditionModel"):
        field_from_diffusers(tmp_path, DDPM)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "MyScheduler"}))
    with pytest.raises(ValueError, match="must be one of diffusers, got MyScheduler"):
        field_from_diffusers(make_unet(), tmp_path)


def test_a_network_must_return_a_tensor() -> None:
    class Tuple(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            return (x,)

    with pytest.raises(TypeError, match=r"network must return a tensor.*got tuple"):
        field_from_diffusers(Tuple(), DDPM)(torch.zeros(2, 3), 1.0)


def test_folders_need_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_unet().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers for folders: pip install 'fluxkernels\[images\]'"):
        field_from_diffusers(tmp_path, DDPM)
    field_from_diffusers(nn.Identity(), DDPM)  # objects need no import
