"""Training of the pipeline, of the score in the plane, and of the field v on top of the pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from experiments.augment.training import CHAIN_STEPS, energy_distance, train
from experiments.augment_images.fields import MixtureScore, TurningField
from experiments.augment_images.law import EVENT, NOISE, ImageLaw, leading_plane
from experiments.common.registry import UsageError
from experiments.common.run import Run
from fluxmatching import (
    AugmentedField,
    CosineFeatures,
    DenoisingScoreMatching,
    EDMField,
    FluxOptions,
    LogUniformNoise,
    augmentation_loss,
    autocorrelation_loss,
    field_from_diffusers,
    step_defect_loss,
)
from fluxmatching.losses.modules import Logged
from fluxmatching.networks import Perceptron

PIPELINE, EXACT, LEARNED = KINDS = ("pipeline", "pipeline + exact v", "pipeline + learned v")
FEATURES = 24


class PipelineLoss(nn.Module):
    """Loss of a noise prediction as in the training scripts of diffusers: mean squared error at random steps.

    Args:
        unet: network; named field for the moving average.
        scheduler: adds the noise.
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.field, self.scheduler = unet, scheduler

    def forward(self, x: Tensor, *, seed: int | Tensor) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]`, for images `[N, 1, 8, 8]`."""
        generator = torch.Generator().manual_seed(int(seed))
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = mse_loss(self.field(self.scheduler.add_noise(x, noise, steps), steps).sample, noise)
        return loss, {"loss": loss.detach()}


class ImageLoss(nn.Module):
    """Loss of v at a random noise level: memory, step defect, and for learned v the augmentation loss and the law.

    λ_aug ν⁴ ℓ_aug/2 + ℓ_autocorrelation + λ_defect (D/2) ℓ_defect + λ_law ℓ_law, with ν² = σ² + τ² and h = σ²/2.
    Memory, augmentation loss and law are those of the coordinates in the plane of v. ℓ_law is the energy distance
    between four Langevin steps from p_σ and p_σ, in units of ν. Only data are used, no true law.

    Args:
        field: s + v.
        sigmas: lowest and highest σ.
        flux_weight: λ_aug; 0 for a v that keeps p_σ anyhow, which then needs no λ_law.
        defect_weight, law_weight: λ_defect and λ_law.
        backend: backend of the ops.
    """

    def __init__(
        self,
        field: AugmentedField,
        sigmas: tuple[float, float],
        *,
        flux_weight: float,
        defect_weight: float,
        law_weight: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.field, self.noise = field, LogUniformNoise(*sigmas)
        self.weights, self.options = (flux_weight, defect_weight, law_weight), FluxOptions(backend=backend)

    def forward(self, x: Tensor, *, seed: int | Tensor) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and its terms, for images `[N, 1, 8, 8]`."""
        flux_weight, defect_weight, law_weight = self.weights
        generator = torch.Generator().manual_seed(int(seed))
        sigma = self.noise.quantile(torch.rand((), generator=generator)).item()
        v, scale = self.field.v, math.hypot(sigma, NOISE)
        assert isinstance(v, TurningField)
        noised = x + sigma * torch.randn(x.shape, generator=generator)
        places, drift = self.project(noised), self.project(self.field(noised, sigma))
        features = CosineFeatures.draw(places, FEATURES)
        defect = step_defect_loss(lambda z: self.field(z, sigma), noised, sigma**2 / 2).mean()
        terms = {
            # Along the plane the drift is a function of the whole image; the loss takes its values at the samples.
            "memory": autocorrelation_loss(lambda _: drift, places, features)[0],
            "defect": noised[0].numel() / 2 * defect,
        }
        loss = terms["memory"] + defect_weight * terms["defect"]
        if flux_weight:
            flux = augmentation_loss(lambda y: v.in_plane(y, sigma), self.project(x), sigma, self.options, seed=seed)
            terms["flux"] = scale**4 / 2 * flux.mean()
            terms["law"] = self.law(x, noised[: len(x) // 2], sigma, generator) / scale
            loss = loss + flux_weight * terms["flux"] + law_weight * terms["law"]
        return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def project(self, images: Tensor) -> Tensor:
        """Return coordinates in the plane of v, `[n, 2]`."""
        return images.flatten(1) @ self.field.v.get_buffer("basis")  # type: ignore[attr-defined]

    def law(self, x: Tensor, moved: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """Return the energy distance in the plane between samples after Langevin steps and others, `[]`."""
        step_size = sigma**2 / 2
        for _ in range(CHAIN_STEPS):
            noise = torch.randn(moved.shape, generator=generator)
            moved = moved + step_size * self.field(moved, sigma) + math.sqrt(2 * step_size) * noise
        others = x[len(moved) :] + sigma * torch.randn(x[len(moved) :].shape, generator=generator)
        return energy_distance(self.project(moved), self.project(others))


def data_of(run: Run, law: ImageLaw, seed: int) -> Tensor:
    """Draw the data of all trainings, `[n, 1, 8, 8]`."""
    return law.sample(run.config.data, 0.0, run.generator("data", seed))


def train_pipeline(run: Run, law: ImageLaw, seed: int) -> Path:
    """Train a UNet with a DDPM scheduler, save both as a pipeline, and return its folder."""
    try:
        import diffusers
    except ImportError as error:
        raise UsageError("augment_images needs diffusers: pip install 'fluxkernels[images]'") from error
    folder = run.out / "models" / f"pipeline-{seed}"
    if (folder / "model_index.json").exists():  # written last
        return folder
    library: Any = diffusers  # loads its classes when asked for, which type checkers do not see
    widths = run.config.channels
    with run.drawing("pipeline", seed):
        unet = library.UNet2DModel(
            sample_size=EVENT[1], in_channels=1, out_channels=1, block_out_channels=widths, layers_per_block=1,
            down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=4, attention_head_dim=4,
        )  # fmt: skip
    # Clipping to [-1, 1] would change a law with noise.
    scheduler = library.DDPMScheduler(clip_sample=False)
    steps, batch = run.config.pipeline_steps, run.config.pipeline_batch
    trained = train(run, PipelineLoss(unet, scheduler), data_of(run, law, seed), "unet", seed, steps=steps, batch=batch)
    library.DDPMPipeline(trained, scheduler).save_pretrained(folder)
    return folder


def train_plane_score(run: Run, places: Tensor, seed: int) -> nn.Module:
    """Train a score of coordinates in the plane by denoising score matching, over the noise levels of v."""
    config = run.config
    with run.drawing("plane score", seed):
        model = EDMField(Perceptron(2, config.width), places.std().item())
    noise = LogUniformNoise(config.low / 2, 2 * config.high)
    loss = DenoisingScoreMatching(model, noise)
    return train(run, loss, places, "plane-score", seed, steps=config.plane_steps, batch=config.batch)


def make_v(run: Run, law: ImageLaw, kind: str, seed: int) -> TurningField:
    """Make an untrained v: with the true plane and score, or with those that the data give."""
    score: nn.Module
    if kind == EXACT:
        basis, score = law.basis, MixtureScore(law.templates @ law.basis, NOISE)
    else:
        data = data_of(run, law, seed)
        basis = leading_plane(data)
        score = train_plane_score(run, data.flatten(1) @ basis, seed)
    with run.drawing("v", kind, seed):
        return TurningField(score, basis, NOISE, run.config.low, run.config.high, run.config.width)


def make_field(run: Run, law: ImageLaw, kind: str, seed: int) -> nn.Module:
    """Load the pipeline from its folder; with a kind of v, train that on top of it."""
    config = run.config
    score = field_from_diffusers(train_pipeline(run, law, seed))
    if kind == PIPELINE:
        return score
    exact = kind == EXACT
    loss = ImageLoss(
        AugmentedField(score, make_v(run, law, kind, seed)),
        (config.low, config.high),
        flux_weight=0.0 if exact else config.flux_weight,
        defect_weight=config.defect_weight,
        law_weight=config.law_weight,
        backend=run.backend,
    )
    return train(
        run, loss, data_of(run, law, seed), kind.replace("+", "and"), seed, steps=config.steps, batch=config.batch
    )
