"""Measures of the trained flows: distance to real images by evaluations, straightness, and distance of the pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from experiments.common.run import Run
from experiments.flow_images.training import NAMES, draw_noise, model_folder
from experiments.flows.measure import SOLVERS, bend_and_length
from experiments.flows.training import EXACT, INDEPENDENT
from experiments.images.datasets import Flipped, Images, to_bytes, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.stages import reference
from fluxmatching import ExactCoupling, ODESolver, couple, integrate_flow

SHOWN = 8  # samples that a run keeps for its figures


def log_distances(run: Run, images: Images, name: str, field: nn.Module) -> None:
    """Log the Fréchet distance of samples to training images, by solver and evaluations (rows "distance")."""
    config = run.config
    done = {(row["solver"], row["evaluations"]) for row in run.rows("distance") if row["variant"] == name}
    real, start = reference(run, images, config.samples), draw_noise(run, config.samples, images, "start")
    for solver, (method, per_step) in SOLVERS.items():
        for count in config.evaluations:
            if count % per_step or (solver, count) in done:
                continue
            steps = ODESolver(method, num_steps=count // per_step)
            found = to_bytes(integrate_flow(field, start, solver=steps, chunk_size=config.chunk_size)).cpu()
            torch.save(found[:SHOWN].clone(), shown_file(run, name, solver, count))
            distance = frechet_distance(random_convolutions(to_numbers(found)), real)
            run.log(kind="distance", variant=name, solver=solver, evaluations=count, distance=distance)


def log_straightness(run: Run, images: Images, name: str, field: nn.Module) -> None:
    """Log bend and length of the trajectories (a row "trajectories"); see `bend_and_length`."""
    config = run.config
    if any(row["variant"] == name for row in run.rows("trajectories")):
        return
    start = draw_noise(run, config.straight_samples, images, "start")
    _, bend, length = bend_and_length(field, start, 1.0, config.sections, config.chunk_size)
    run.log(kind="trajectories", variant=name, bend=bend, length=length, ratio=bend / length)


def log_pairing(run: Run, images: Images) -> None:
    """Log the mean squared distance |x1 - x0|² of pairs per coordinate, by coupling (rows "pairing")."""
    config, flipped = run.config, Flipped(images.train, run.config.flips, run.device)
    done = {row["variant"] for row in run.rows("pairing")}
    for name in NAMES[:2]:
        if name in done:
            continue
        found = []
        for index in range(config.minibatches):
            generator = run.generator("pairing", index)
            rows = torch.randperm(len(flipped), generator=generator)[: config.batch]
            x0, x1 = draw_noise(run, len(rows), images, "noise of pairing", index), flipped.images[rows]
            x1 = to_numbers(x1.to(run.device))
            x0, x1 = couple(ExactCoupling(), x0, x1) if name == EXACT else (x0, x1)
            found.append((x1 - x0).square().mean())
        run.log(kind="pairing", variant=name, distance=torch.stack(found).mean())


def shown_file(run: Run, name: str, solver: str, evaluations: int) -> Path:
    """Return the file that keeps some samples, bytes `[SHOWN, 3, size, size]`."""
    return model_folder(run, name) / f"{solver}-{evaluations}.pt"


def pairing(run: Run) -> float:
    """Return the mean squared distance of pairs by optimal transport over that of independent pairs."""
    found = {row["variant"]: row["distance"] for row in run.rows("pairing")}
    return found[EXACT] / found[INDEPENDENT]
