"""Training of the four models: Flux Matching and score matching, each with and without the mask."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.distances import wasserstein2
from experiments.common.objectives import DSM, FLUX, averaged_field, make_loss
from experiments.common.run import Run
from experiments.common.sampling import sample_reverse_ve
from experiments.common.schedules import cosine_decay
from experiments.regions.images import (
    center_correlation,
    displacement,
    draw_centers,
    draw_images,
    find_centers,
)
from experiments.regions.networks import PartsNetwork
from fluxmatching import EDMField, LogUniformNoise, Trainer, TrainingOptions, TruncatedExponentialHorizon
from fluxmatching.fields import NoisyField

MASKED, FULL = MASKS = ("masked", "full")
MODELS = tuple(product((FLUX, DSM), MASKS))
SHOWN = 12  # generated images that a run keeps
BLANK = 0.25  # root mean square difference from the nearest disc above which a part counts as no disc


def data(run: Run) -> Tensor:
    """Draw the training images, `[data, 2, 8, 8]`."""
    return draw_images(run.config.data, run.generator("data")).to(run.device)


def make_trainer(run: Run, objective: str, mask: str, seed: int) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint; models of one seed share initial weights and noise.

    Args:
        run: settings, random numbers, backend, device and folder.
        objective: `FLUX` or `DSM`.
        mask: one of `MASKS`.
        seed: determines initial weights, minibatches and noise.
    """
    config, images = run.config, data(run)
    with run.drawing("weights", seed):
        field = EDMField(PartsNetwork(config.width, mask == MASKED), images.std().item())
        noise = LogUniformNoise(config.sigma_min, config.sigma_max)
        loss = make_loss(objective, field, noise, TruncatedExponentialHorizon(1.0), backend=run.backend)
    options = TrainingOptions(
        config.iterations, config.batch, lr=config.lr, optimizer="adam", warmup=config.warmup, ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1, accelerator=str(run.device), progress=False,
    )  # fmt: skip
    folder = samples_file(run, objective, mask, seed).parent
    return Trainer(loss, images, options, folder=folder, lr_factor=cosine_decay(config.iterations))


def train(run: Run, objective: str, mask: str, seed: int) -> None:
    """Train one model and log its row "model", if this is missing; keep some of its images."""
    key = {"objective": objective, "mask": mask, "seed": seed}
    if any(key.items() <= row.items() for row in run.rows("model")):
        return
    trainer = make_trainer(run, objective, mask, seed)
    trainer.run()
    field = averaged_field(trainer)
    images = sample(run, field, seed)
    torch.save(images[:SHOWN].cpu(), samples_file(run, objective, mask, seed))
    run.log(kind="model", **key, seen=left_sees_right(field, data(run)[:1], 1.0), **measure(run, images))


def sample(run: Run, field: NoisyField, seed: int) -> Tensor:
    """Generate images, from the same noise for all models of a seed."""
    config = run.config
    like = data(run)[:1].expand(config.samples, -1, -1, -1)
    generator = run.generator("sample", seed)
    return sample_reverse_ve(field, like, config.sampling_steps, config.sigma_min, config.sigma_max, generator)


def measure(run: Run, images: Tensor) -> dict[str, float]:
    """Compare images with the known distribution of centers.

    Returns:
        "correlation" and "displacement" of right centers with the mirror images of left ones; "joint", "left" and
        "right", W2 of the centers to as many true ones, in pixels; "error", root mean square difference of pixels from
        the nearest disc; "blank", the share of parts that are no disc.
    """
    centers, error = find_centers(images)
    truth = draw_centers(len(images), run.generator("truth")).to(centers)
    return {
        "correlation": center_correlation(centers),
        "displacement": displacement(centers),
        "joint": wasserstein2(centers, truth),
        "left": wasserstein2(centers[:, 0], truth[:, 0]),
        "right": wasserstein2(centers[:, 1], truth[:, 1]),
        "error": error.square().mean().sqrt().item(),
        "blank": (error > BLANK).double().mean().item(),
    }


def measure_truth(run: Run) -> None:
    """Log the missing row "floor": other true images, measured as generated ones are."""
    if not run.rows("floor"):
        run.log(kind="floor", **measure(run, draw_images(run.config.samples, run.generator("floor"))))


def left_sees_right(field: nn.Module, x: Tensor, sigma: float) -> float:
    """Return the largest entry of the Jacobian of the left part of f with respect to the right part of x.

    Args:
        field: f(z, σ).
        x: one image, `[1, 2, 8, 8]`.
        sigma: σ.
    """
    jacobian: Tensor = torch.func.jacrev(lambda z: field(z, torch.tensor(sigma).to(z))[0, 0])(x)
    return jacobian[:, :, 0, 1].abs().max().item()


def samples_file(run: Run, objective: str, mask: str, seed: int) -> Path:
    """Return the file that keeps some generated images of a model."""
    return run.out / "models" / f"{objective}-{mask}-{seed}" / "samples.pt"
