"""Fields of images with and without the mixing proxy, sampled in few predictor-corrector steps (Fig. 6)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.common.objectives import DSM, FAST, FLUX
from experiments.common.run import Run
from experiments.images.datasets import load, to_bytes, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.training import averaged_field, folder, make_trainer, start_noise
from fluxmatching import log_sigma_grid, predictor_corrector

TRAINED = (FAST, FLUX, DSM)
BATCH = 250
SHOWN = 16


def study(run: Run) -> str:
    """Train what is not trained yet, and log the distance by number of steps; returns what the data are."""
    config = run.config
    images = load(config.dataset)
    count = min(config.samples, len(images.test))
    real = random_convolutions(to_numbers(images.train[: config.samples]))
    if not run.rows("floor"):
        held_out = random_convolutions(to_numbers(images.test[:count]))
        run.log(kind="floor", distance=frechet_distance(held_out, real))
    for objective in TRAINED:
        done = {row["steps"] for row in run.rows("pictures") if row["field"] == objective}
        if done >= set(config.steps):
            continue
        trainer = make_trainer(run, objective, images, iterations=config.iterations, folder=folder(run, objective))
        trainer.run()
        field = averaged_field(trainer)
        for steps in config.steps:
            if steps not in done:
                found = sample(run, field, steps, tuple(images.train.shape[1:]), f"{objective}: {steps} steps")
                torch.save(found[:SHOWN].clone(), shown_file(run, objective, steps))
                distance = frechet_distance(random_convolutions(to_numbers(found)), real)
                run.log(kind="pictures", field=objective, steps=steps, distance=distance)
    return images.source


def sample(run: Run, field: torch.nn.Module, steps: int, shape: tuple[int, ...], desc: str) -> Tensor:
    """Bytes, from the same noise for all fields."""
    config, parts = run.config, []
    sigmas = log_sigma_grid(steps, config.sigma_min, config.sigma_max)
    for batch in run.bar(range((config.samples + BATCH - 1) // BATCH), desc):
        start = start_noise(run, min(BATCH, config.samples - batch * BATCH), shape, batch)
        noise = torch.Generator(run.device).manual_seed(run.generator("noise", steps, batch).initial_seed())
        parts.append(to_bytes(predictor_corrector(field, start, sigmas, generator=noise)).cpu())
    return torch.cat(parts)


def shown_file(run: Run, objective: str, steps: int) -> Path:
    """Some of the images of a field in so many steps."""
    return folder(run, objective) / f"shown-{steps}.pt"
