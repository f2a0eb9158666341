"""Training of both fields, by Flux Matching and by score matching, with the same network, data and noise levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.common.objectives import HORIZONS, make_loss
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.images.datasets import Flipped, Images
from fluxmatching import EDMField, LogNormalNoise, Trainer, TrainingOptions, UNet

SIGMA_DATA = 0.5  # EDM's setting; the deviation of CIFAR-10 in [-1, 1] is 0.50


def network_arguments(run: Run, size: int) -> dict[str, Any]:
    """Arguments of the UNet of Table 3 with the preset's sizes."""
    config = run.config
    return {
        "size": size,
        "width": config.width,
        "multipliers": config.multipliers,
        "attention": (size // 2**config.attention_level,),
        "blocks": config.blocks,
        "dropout": config.dropout,
        "norm_num_groups": math.gcd(32, config.width),
    }


def network(run: Run, size: int) -> UNet:
    """UNet of Table 3 with the preset's sizes."""
    try:
        return UNet(**network_arguments(run, size))
    except ImportError as error:
        raise UsageError(str(error)) from error


def make_trainer(
    run: Run, objective: str, images: Images, *, iterations: int, backend: str | None = None, folder: Path | None = None
) -> Trainer:
    """A trainer that stops at `iterations`. Both objectives share initial weights, minibatches and noise levels."""
    config = run.config
    if len(images.train) < config.batch:
        raise UsageError(f"batch must be at most the {len(images.train)} training images, got {config.batch}")
    try:
        with run.drawing("weights"):
            field = EDMField(network(run, images.train.shape[-1]), SIGMA_DATA)
            horizon = HORIZONS[config.horizon](config.tau_max)
            chosen = {"backend": backend or run.backend, **config.loss_options()}
            loss = make_loss(objective, field, LogNormalNoise(), horizon, **chosen)
        options = TrainingOptions(
            iterations, config.batch, lr=config.lr, warmup=config.warmup, ema=config.ema, precision=config.precision,
            seed=run.generator("training").initial_seed() >> 1, accelerator=str(run.device),
            progress=run.progress and folder is not None,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Trainer(loss, Flipped(images.train, config.flips, run.device), options, folder=folder)


def folder(run: Run, objective: str) -> Path:
    """Folder of a model's checkpoints and of its kept samples."""
    return run.out / "models" / objective


def start_noise(run: Run, count: int, shape: tuple[int, ...], batch: int) -> Tensor:
    """Start of the samples of a batch: N(0, σ_max² I), the same for all objectives and stages."""
    generator = run.generator("start", batch)
    return run.config.sigma_max * torch.randn(count, *shape, generator=generator).to(run.device)
