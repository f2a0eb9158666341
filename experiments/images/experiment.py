"""Images without any imposed structure (Sec. 4.3, B.3, Table 1): Flux Matching beside score matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from experiments.common.clock import Clock
from experiments.common.objectives import DSM, FLUX
from experiments.common.registry import GPU, Experiment
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.common.timing import log_steps
from experiments.images import fidelity, figures
from experiments.images.config import ON_A_GPU, SHOWN, SMALL, SMOKE, Config
from experiments.images.datasets import Images, load, to_numbers
from experiments.images.example import example
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.results import results
from experiments.images.sampling import likelihood, sample
from experiments.images.stages import best_field, choice, draw, log_floor, reference, train
from experiments.images.training import folder, make_trainer

TRAINED = (FLUX, DSM)


def main(run: Run) -> None:
    """Train both fields in turns and evaluate samples on the way; then sample the best of each and compare."""
    config, clock = run.config, Clock.start(run.config.minutes)
    if config.fid:
        fidelity.check(config.inception_weights)
    images = load(config.dataset)
    log_steps(run, TRAINED, lambda o, b: make_trainer(run, o, images, iterations=10**9, backend=b), config.timed_steps)
    for count in sorted({config.evaluation_samples, config.samples}):
        log_floor(run, images, count)
    train(run, TRAINED, images, clock)
    for objective in TRAINED:
        judge(run, objective, images, clock)
    draw(run, TRAINED)
    grids = {"real": images.train[choice(run, len(images.train), SHOWN)]}
    grids |= {objective: torch.load(shown_file(run, objective), weights_only=True) for objective in TRAINED}
    figures.draw_grids(run.figure("samples"), grids)
    run.summary(
        results(run),
        [
            Figure(run.figure("samples"), "Real images, and samples of both models from the same noise."),
            Figure(run.figure("training"), "Samples from the same noise during the training."),
            Figure(run.figure("distance"), "Fréchet distance on random convolutions during the training."),
        ],
        (f"Data: {images.source}.", "The distance on random convolutions is not an FID and not comparable with one."),
    )


def judge(run: Run, objective: str, images: Images, clock: Clock) -> None:
    """Log distances and likelihood of samples of the best model of an objective (row "final").

    Raises:
        Paused: the time is up.
    """
    config = run.config
    if any(row["objective"] == objective for row in run.rows("final")):
        return
    field, shape = best_field(run, objective, images), tuple(images.train.shape[1:])
    keep = folder(run, objective) / "samples"
    found = sample(run, field, config.samples, shape, f"{objective}: samples", keep=keep, clock=clock)
    torch.save(found[:SHOWN].clone(), shown_file(run, objective))
    real = reference(run, images, len(found))
    row: dict[str, Any] = {"distance": frechet_distance(random_convolutions(to_numbers(found)), real)}
    if config.fid:
        row["fid"], row["inception_score"] = fidelity.fid_and_inception_score(
            found, images.train, config.inception_weights, run.device
        )
    if config.likelihood_images:
        test = images.test[choice(run, len(images.test), config.likelihood_images)]
        row["bits"] = likelihood(run, field, objective, test, clock)
    run.log(kind="final", objective=objective, **row)


def shown_file(run: Run, objective: str) -> Path:
    """File that keeps some samples of the best model."""
    return folder(run, objective) / "shown.pt"


EXPERIMENT = Experiment(
    name="images",
    title="Images, no structure imposed",
    paper="Sec. 4.3, B.3, Table 1",
    claim=(
        "Flux Matching alone trains a generative model of images. Its samples are somewhat worse than those of score "
        "matching, and a step costs more."
    ),
    presets={"smoke": SMOKE, "small": SMALL, GPU: ON_A_GPU, "paper": Config()},
    main=main,
    example=example,
)
