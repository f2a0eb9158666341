"""Training in turns: every objective up to a stage, then samples of each are evaluated; the best models are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.clock import Clock
from experiments.common.objectives import averaged_field, stages
from experiments.common.registry import Paused
from experiments.common.run import Run
from experiments.images import fidelity, figures
from experiments.images.config import SHOWN
from experiments.images.datasets import Images, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import sample
from experiments.images.training import folder, make_trainer
from fluxmatching import Trainer


def train(run: Run, objectives: Sequence[str], images: Images, clock: Clock) -> None:
    """Train all objectives through all stages, and evaluate samples of the moving averages at each stage.

    Raises:
        Paused: the time is up.
    """
    config = run.config
    real = reference(run, images, config.evaluation_samples)
    for stage, target in enumerate(stages(config), 1):
        judged = {row["objective"] for row in run.rows("progress") if row["stage"] == stage}
        if judged >= set(objectives):
            continue
        trainers = {o: make_trainer(run, o, images, iterations=target, folder=folder(run, o)) for o in objectives}
        for turn, trainer in enumerate(trainers.values()):
            if trainer.iteration < target:  # share the remaining time equally among the remaining objectives
                trainer.run(clock.left / (len(objectives) - turn))
        if any(trainer.iteration < target for trainer in trainers.values()):
            reached = ", ".join(f"{o} at iteration {t.iteration}" for o, t in trainers.items())
            raise Paused(f"{reached}, of {config.iterations}")
        for objective in objectives:
            if objective not in judged:
                clock.check(f"samples of {objective} at iteration {target}")
                evaluate(run, objective, trainers[objective], images, real, stage)
        draw(run, objectives)


def evaluate(run: Run, objective: str, trainer: Trainer, images: Images, real: Tensor, stage: int) -> None:
    """Log the distances of samples to the features `real` (row "progress"), and keep the best model so far."""
    config, field = run.config, averaged_field(trainer)
    shape, name = tuple(images.train.shape[1:]), f"{objective}: samples at {trainer.iteration}"
    found = sample(run, field, config.evaluation_samples, shape, name)
    distance = frechet_distance(random_convolutions(to_numbers(found)), real)
    fid = None
    if config.fid:
        fid = fidelity.fid_and_inception_score(found, images.train, config.inception_weights, run.device)[0]
    judged = distance if fid is None else fid
    best = min((row["judged"] for row in run.rows("progress") if row["objective"] == objective), default=math.inf)
    if judged < best:
        torch.save(field.state_dict(), best_file(run, objective))
    torch.save(found[:SHOWN].clone(), folder(run, objective) / f"shown-{stage}.pt")
    run.log(
        kind="progress",
        objective=objective,
        stage=stage,
        iteration=trainer.iteration,
        distance=distance,
        fid=fid,
        judged=judged,
    )


def best_field(run: Run, objective: str, images: Images) -> nn.Module:
    """Load the field with the best samples."""
    field = averaged_field(make_trainer(run, objective, images, iterations=1))
    field.load_state_dict(torch.load(best_file(run, objective), map_location=run.device, weights_only=True))
    return field


def best_file(run: Run, objective: str) -> Path:
    """File of the best field's weights."""
    return folder(run, objective) / "best.pt"


def choice(run: Run, total: int, count: int) -> Tensor:
    """Random indices of images that represent a data set, which may be sorted by class; fixed during a run."""
    return torch.randperm(total, generator=run.generator("choice", total))[:count]


def reference(run: Run, images: Images, count: int) -> Tensor:
    """Features of `count` training images, for comparison with as many samples."""
    return random_convolutions(to_numbers(images.train[choice(run, len(images.train), count)]))


def log_floor(run: Run, images: Images, count: int) -> None:
    """Log the distance of held-out real images, the value of a perfect model, and that of noise with their moments."""
    if any(row["samples"] == count for row in run.rows("floor")):
        return
    held_out = to_numbers(images.test[choice(run, len(images.test), count)])
    noise = torch.randn(held_out.shape, generator=run.generator("moments"))
    independent = held_out.mean(0) + held_out.std(0) * noise
    real = reference(run, images, count)
    distances = [frechet_distance(random_convolutions(x), real) for x in (held_out, independent)]
    run.log(kind="floor", samples=count, distance=distances[0], noise=distances[1])


def floor(run: Run, count: int) -> dict[str, float]:
    """The row that `log_floor` wrote."""
    return next(row for row in run.rows("floor") if row["samples"] == count)


def draw(run: Run, objectives: Sequence[str]) -> None:
    """Draw the figures that grow during training."""
    rows = run.rows("progress")
    by_objective = {o: [row for row in rows if row["objective"] == o] for o in objectives}
    curves = {o: [(row["iteration"], row["distance"]) for row in found] for o, found in by_objective.items()}
    shown = {
        o: {
            row["iteration"]: torch.load(folder(run, o) / f"shown-{row['stage']}.pt", weights_only=True)
            for row in found
        }
        for o, found in by_objective.items()
    }
    figures.draw_distance(run.figure("distance"), curves, floor(run, run.config.evaluation_samples)["distance"])
    figures.draw_rows(run.figure("training"), shown, "iteration")
