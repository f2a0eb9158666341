"""Trajectories of two masses between springs (Sec. 4.5, B.5): the effect of a causal mask on both objectives."""

from __future__ import annotations

from functools import partial

import torch

from experiments.common.clock import Clock
from experiments.common.objectives import stages
from experiments.common.registry import GPU, Experiment
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.common.timing import log_steps
from experiments.springs import figures, line, linear
from experiments.springs.config import ON_A_GPU, SMALL, SMOKE, Config
from experiments.springs.example import example
from experiments.springs.results import linear_curves, relative_changes, results, trained_sizes
from experiments.springs.simulator import STEP_SIZE
from experiments.springs.training import (
    FULL,
    MODELS,
    OBJECTIVES,
    SHOWN,
    data,
    floor,
    log_sizes,
    make_trainer,
    model_data,
    samples_file,
    train,
)


def main(run: Run) -> None:
    """Train the models with every seed, sample, compare, draw.

    Raises:
        Paused: the time is up.
    """
    config, clock = run.config, Clock.start(run.config.minutes)
    make = partial(make_trainer, run, mask=FULL, seed=0, iterations=10**9)
    log_steps(run, OBJECTIVES, lambda o, b: make(o, backend=b), config.timed_steps)
    linear.study(run, model_data(run))
    line.study(run, model_data(run))
    for seed in range(config.seeds):
        for objective, mask in MODELS:
            train(run, objective, mask, seed, clock)
    log_sizes(run)
    if not run.rows("floor"):
        run.log(kind="floor", **floor(run))
    changes = {o: {stage: relative_changes(run, o, stage) for stage in stages(config)} for o in OBJECTIVES}
    run.summary(results(run, changes), draw(run, changes), ("`figures/masses.gif` shows the masses in motion.",))


def draw(run: Run, changes: dict[str, dict[int, list[float]]]) -> list[Figure]:
    """Draw all figures and the animation; `changes` are the relative changes of W2 by objective and stage."""
    mask, closed_form, trajectories = (run.figure(name) for name in ("mask", "linear", "trajectories"))
    freedom = run.figure("line")
    figures.draw_line(freedom, run.rows("line"))
    figures.draw_change(mask, changes)
    figures.draw_linear(closed_form, *linear_curves(run), trained_sizes(run))
    shown = {"simulator": data(run)[:SHOWN].cpu()}
    shown |= {f"{o}, {m}": torch.load(samples_file(run, o, m, 0), weights_only=True) for o, m in MODELS}
    figures.draw_trajectories(trajectories, shown, run.config.every * STEP_SIZE)
    figures.animate(mask.with_name("masses.gif"), shown)
    return [
        Figure(mask, "Relative change of W2 by the causal mask over the training (Fig. 7, right); one point per seed."),
        Figure(closed_form, "Linear fields in closed form: W2 of their samples, and their size."),
        Figure(
            freedom,
            "Where the gradient of a minibatch's loss vanishes on the line from the linear field that keeps p_σ (0) to "
            "masked score matching (1); the curve is for centers that are each alone.",
        ),
        Figure(trajectories, "Trajectories of the simulator and of each model, seed 0."),
    ]


EXPERIMENT = Experiment(
    name="springs",
    title="A causal mask for trajectories",
    paper="Sec. 4.5, B.5, Fig. 7",
    claim=(
        "A field that sees only earlier times cannot be a score. Trained by Flux Matching it generates better "
        "trajectories than a field that sees all times; trained by score matching, worse ones."
    ),
    presets={"smoke": SMOKE, "small": SMALL, GPU: ON_A_GPU, "paper": Config()},
    main=main,
    example=example,
)
