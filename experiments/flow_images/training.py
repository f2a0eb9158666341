"""Training of the flows: one UNet, and three choices of pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.objectives import averaged_field
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from experiments.flows.training import EXACT, INDEPENDENT, RECTIFIED
from experiments.images.datasets import Flipped, Images
from experiments.images.training import network
from fluxmatching import ExactCoupling, FlowMatching, ODESolver, Trainer, TrainingOptions, rectified_pairs

NAMES = (INDEPENDENT, EXACT, RECTIFIED)


def draw_noise(run: Run, count: int, images: Images, *key: int | str) -> Tensor:
    """Draw normal noise in the shape of the images, `[count, 3, size, size]`; one key always gives the same."""
    return torch.randn(count, *images.train.shape[1:], generator=run.generator(*key)).to(run.device)


def make_pairs(run: Run, images: Images) -> Tensor:
    """Pair noise with the samples to which the trained flow `INDEPENDENT` carries it, `[pairs, 2, 3, size, size]`."""
    config, file = run.config, model_folder(run, RECTIFIED) / "pairs.pt"
    if not file.exists():
        pairs = rectified_pairs(
            train(run, images, INDEPENDENT),
            draw_noise(run, config.pairs, images, "start of pairs"),
            solver=ODESolver("heun", num_steps=config.pair_steps),
            chunk_size=config.chunk_size,
            progress=run.progress,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(torch.stack(pairs, 1).cpu(), part)
        part.replace(file)
    found: Tensor = torch.load(file, weights_only=True)
    return found


def make_loss(run: Run, images: Images, name: str) -> FlowMatching:
    """Make the loss module of a flow. All start with the same weights, but the rectified flow with the trained ones."""
    with run.drawing("weights"):
        field = network(run, images.train.shape[-1])
    if name == RECTIFIED:
        field.load_state_dict(train(run, images, INDEPENDENT).state_dict())
    return FlowMatching(field, coupling=ExactCoupling() if name == EXACT else None, paired=name == RECTIFIED)


def make_trainer(run: Run, images: Images, name: str) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint in the folder of the flow."""
    config = run.config
    if len(images.train) < config.batch:
        raise UsageError(f"batch must be at most the {len(images.train)} training images, got {config.batch}")
    iterations = config.rectified_iterations if name == RECTIFIED else config.iterations
    options = TrainingOptions(
        iterations,
        config.batch,
        lr=config.lr,
        warmup=config.warmup,
        ema=config.ema,
        precision=config.precision,
        seed=run.generator("training").initial_seed() >> 1,
        accelerator=str(run.device),
        checkpoint_every=100,
        progress=run.progress,
    )
    try:
        loss = make_loss(run, images, name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    data = make_pairs(run, images) if name == RECTIFIED else Flipped(images.train, config.flips, run.device)
    return Trainer(loss, data, options, folder=model_folder(run, name), lr_factor=cosine_decay(iterations))


def train(run: Run, images: Images, name: str) -> nn.Module:
    """Train, or resume training, and return the averaged field v(x, t)."""
    trainer = make_trainer(run, images, name)
    trainer.run()
    return averaged_field(trainer)


def model_folder(run: Run, name: str) -> Path:
    """Return the folder of a training."""
    return run.out / "models" / name.replace(" ", "-")
