"""Fields of images with and without the mixing proxy, sampled in few predictor-corrector steps (Fig. 6)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.clock import Clock
from experiments.common.objectives import OBJECTIVES
from experiments.common.run import Run
from experiments.images import fidelity
from experiments.images.datasets import Images, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import in_batches
from experiments.images.stages import best_field, log_floor, reference, train
from experiments.images.training import folder
from fluxmatching import exponential_schedule, predictor_corrector

SHOWN = 16


def study(run: Run, images: Images, clock: Clock) -> None:
    """Train as in `images`, then log the distance of the best models' samples by number of steps (rows "pictures")."""
    config = run.config
    for count in sorted({config.evaluation_samples, config.samples}):
        log_floor(run, images, count)
    train(run, OBJECTIVES, images, clock)
    real = reference(run, images, config.samples)
    for objective in OBJECTIVES:
        field = best_field(run, objective, images)
        done = {row["steps"] for row in run.rows("pictures") if row["field"] == objective}
        for num_steps in config.steps:
            if num_steps in done:
                continue
            desc = f"{objective}: {num_steps} steps"
            clock.check(desc)
            found = sample(run, field, num_steps, tuple(images.train.shape[1:]), desc)
            torch.save(found[:SHOWN].clone(), shown_file(run, objective, num_steps))
            row = {"distance": frechet_distance(random_convolutions(to_numbers(found)), real)}
            if config.fid:
                row["fid"], _ = fidelity.fid_and_inception_score(
                    found, images.train, config.inception_weights, run.device
                )
            run.log(kind="pictures", field=objective, steps=num_steps, **row)


def sample(run: Run, field: nn.Module, num_steps: int, shape: tuple[int, ...], desc: str) -> Tensor:
    """Draw images as bytes, from the same noise for all fields."""
    config = run.config
    sigmas = exponential_schedule(num_steps, config.sigma_min, config.sigma_max)

    def draw(start: Tensor, batch: int) -> Tensor:
        return predictor_corrector(field, start, sigmas, generator=run.device_generator("noise", num_steps, batch))

    return in_batches(run, draw, config.samples, shape, desc)


def shown_file(run: Run, objective: str, num_steps: int) -> Path:
    """File that keeps some images of a field, made in that number of steps."""
    return folder(run, objective) / f"shown-in-{num_steps}.pt"
