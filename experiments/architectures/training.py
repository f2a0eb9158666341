"""Training of every architecture by Flux Matching and by score matching, with the same data, steps and noise."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.architectures.networks import ARCHITECTURES
from experiments.architectures.problem import draw_images, spread
from experiments.common.objectives import DSM, FLUX, averaged_field, make_loss
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from fluxmatching import EDMField, LogUniformNoise, Trainer, TrainingOptions, TruncatedExponentialHorizon

OBJECTIVES = (FLUX, DSM)


def data(run: Run) -> Tensor:
    """Draw the training images, `[data, 1, 8, 8]`."""
    return draw_images(run.config.data, run.generator("data")).float().to(run.device)


def make_field(run: Run, architecture: str, seed: int) -> EDMField:
    """Make the untrained field of a seed."""
    config = run.config
    options = {"width": config.width, "blocks": config.blocks, "heads": config.heads}
    with run.drawing("weights", seed):
        network = ARCHITECTURES[architecture].make(config.unet_width, options)
    return EDMField(network, spread()).to(run.device)


def make_trainer(run: Run, architecture: str, objective: str, seed: int, keep: bool = True) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint.

    Args:
        run: settings, random numbers, backend, device and folder.
        architecture: one of `ARCHITECTURES`.
        objective: one of `OBJECTIVES`, which share initial weights and minibatches.
        seed: determines initial weights, minibatches and noise.
        keep: whether checkpoints are written.
    """
    config = run.config
    field = make_field(run, architecture, seed)
    with run.drawing("normalizer", seed):
        noise = LogUniformNoise(config.sigma_min, config.sigma_max)
        loss = make_loss(objective, field, noise, TruncatedExponentialHorizon(1.0), backend=run.backend)
    options = TrainingOptions(
        config.iterations, config.batch, lr=config.lr, optimizer="adam", warmup=config.warmup, ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1, accelerator=str(run.device), progress=False,
    )  # fmt: skip
    name = f"{architecture}-{objective}-{seed}".replace(", ", "-").replace(" ", "-")
    folder = run.out / "models" / name if keep else None
    return Trainer(loss, data(run), options, folder=folder, lr_factor=cosine_decay(config.iterations))


def train(run: Run, architecture: str, objective: str, seed: int) -> nn.Module:
    """Train, or resume training, and return the averaged field f(z, σ)."""
    trainer = make_trainer(run, architecture, objective, seed)
    trainer.run()
    run.save_seconds()
    return averaged_field(trainer).requires_grad_(False)
