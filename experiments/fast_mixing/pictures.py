"""Fields of images with and without the mixing proxy, sampled in few predictor-corrector steps (Fig. 6)."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.clock import Clock
from experiments.common.objectives import OBJECTIVES
from experiments.common.run import Run
from experiments.fast_mixing.steps import FIXED, GRID_OF_IMAGES, TUNED, Steps, tune
from experiments.images import fidelity
from experiments.images.datasets import Images, to_bytes, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import in_batches
from experiments.images.stages import best_field, log_floor, reference, train
from experiments.images.training import folder, start_noise

SHOWN = 16
TUNING_BATCH = 10**6  # a number that no batch of the samples has
MIN_SAMPLES = 64  # fewer have no usable covariance
KEPT = 4  # steps of the grid that are judged again


def study(run: Run, images: Images, clock: Clock) -> None:
    """Train as in `images`, then log the distance of the best models' samples by number of steps (rows "pictures")."""
    config = run.config
    for count in sorted({config.evaluation_samples, config.samples}):
        log_floor(run, images, count)
    train(run, OBJECTIVES, images, clock)
    real = reference(run, images, config.samples)
    for objective in OBJECTIVES:
        field = best_field(run, objective, images)
        done = {(row["procedure"], row["steps"]) for row in run.rows("pictures") if row["field"] == objective}
        for procedure, num_steps in product(config.procedures, config.steps):
            if (procedure, num_steps) in done:
                continue
            desc = f"{objective}: {num_steps} steps, {procedure}"
            clock.check(desc)
            shape = tuple(images.train.shape[1:])
            steps = tuned(run, field, num_steps, shape, images) if procedure == TUNED else FIXED[procedure]
            found = sample(run, field, num_steps, steps, shape, desc)
            torch.save(found[:SHOWN].clone(), shown_file(run, objective, num_steps, procedure))
            row = {"distance": frechet_distance(random_convolutions(to_numbers(found)), real)}
            if config.fid:
                row["fid"], _ = fidelity.fid_and_inception_score(
                    found, images.train, config.inception_weights, run.device
                )
            run.log(
                kind="pictures", field=objective, procedure=procedure, steps=num_steps, ratio=steps.ratio,
                scale=steps.scale, spacing=steps.spacing, **row,
            )  # fmt: skip


def sample(run: Run, field: nn.Module, num_steps: int, steps: Steps, shape: tuple[int, ...], desc: str) -> Tensor:
    """Draw images as bytes, from the same noise for all fields."""

    def draw(start: Tensor, batch: int) -> Tensor:
        return sample_batch(run, field, start, num_steps, steps, batch)

    return in_batches(run, draw, run.config.samples, shape, desc)


def sample_batch(run: Run, field: nn.Module, start: Tensor, num_steps: int, steps: Steps, batch: int) -> Tensor:
    """Draw one batch of images from its noise."""
    levels = (run.config.sigma_min, run.config.sigma_max)
    return steps.sample(field, start, num_steps, levels, run.device_generator("noise", num_steps, batch))


def tuned(run: Run, field: nn.Module, num_steps: int, shape: tuple[int, ...], images: Images) -> Steps:
    """Return the steps of the grid with the nearest samples, from other noise than the samples that count."""
    real = reference(run, images, run.config.tuning_samples)

    def distance(steps: Steps, count: int) -> float:
        start = start_noise(run, count, shape, TUNING_BATCH)
        found = sample_batch(run, field, start, num_steps, steps, TUNING_BATCH)
        if not found.isfinite().all():
            return math.nan
        return frechet_distance(random_convolutions(to_numbers(to_bytes(found))), real)

    few = max(MIN_SAMPLES, run.config.tuning_samples // 2)
    return tune(distance, GRID_OF_IMAGES[:: run.config.thinning], few, run.config.tuning_samples, KEPT)


def shown_file(run: Run, objective: str, num_steps: int, procedure: str) -> Path:
    """File that keeps some images of a field, made in that number of steps."""
    return folder(run, objective) / f"shown-{procedure.replace(' ', '-')}-in-{num_steps}.pt"
