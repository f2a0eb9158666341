"""Trajectories of two masses between springs (Sec. 4.5, B.5): the effect of a causal mask on both objectives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from experiments.common.objectives import check_training, stages
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.common.timing import log_steps
from experiments.springs import figures, linear
from experiments.springs.results import linear_curves, relative_changes, results, trained_sizes
from experiments.springs.simulator import LENGTH, STEP_SIZE
from experiments.springs.training import (
    FULL,
    MODELS,
    OBJECTIVES,
    SHOWN,
    data,
    floor,
    log_sizes,
    make_trainer,
    samples_file,
    train,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment; the defaults are the paper's (Table 6).

    Args:
        seeds: trainings per model.
        data: number of training trajectories.
        every: keep every n-th of their 50 time points, starting with the first.
        iterations, batch, lr, warmup, ema: training with Adam.
        evaluations: number of evaluations per model, spread evenly over the training.
        horizon, tau_max: horizon of Flux Matching: "learned", "uniform" or "exponential" with rate 1, all on
            [0, tau_max].
        sigma_min, sigma_max: noise levels: log-uniform between them in training, from one to the other in sampling.
        width, blocks, heads: size of the transformer.
        samples: number of generated trajectories.
        sampling_steps: number of steps of the reverse VE sampler.
        timed_steps: training steps timed on each backend.
    """

    seeds: int = 3
    data: int = 2000
    every: int = 1
    iterations: int = 10_000
    batch: int = 256
    lr: float = 3e-4
    warmup: int = 0
    ema: float = 0.99
    evaluations: int = 5
    horizon: str = "learned"
    tau_max: float = 4.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    width: int = 512
    blocks: int = 12
    heads: int = 8
    samples: int = 2000
    sampling_steps: int = 512
    timed_steps: int = 20

    def __post_init__(self) -> None:
        check_sizes(self, data=self.batch, warmup=0, ema=0)
        check_training("springs", self)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if self.every > LENGTH // 2:
            raise ValueError(f"every must leave two points of {LENGTH}, so be at most {LENGTH // 2}, got {self.every}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 heads, got {self.width} and {self.heads}")


def main(run: Run) -> None:
    """Train the models with every seed, sample, compare, draw."""
    config = run.config
    make = partial(make_trainer, run, mask=FULL, seed=0, iterations=10**9)
    log_steps(run, OBJECTIVES, lambda o, b: make(o, backend=b), config.timed_steps)
    for seed in range(config.seeds):
        for objective, mask in MODELS:
            train(run, objective, mask, seed)
    linear.study(run, data(run))
    log_sizes(run)
    if not run.rows("floor"):
        run.log(kind="floor", w2=floor(run))
    changes = {o: {stage: relative_changes(run, o, stage) for stage in stages(config)} for o in OBJECTIVES}
    run.summary(results(run, changes), draw(run, changes), ("`figures/masses.gif` shows the masses in motion.",))


def draw(run: Run, changes: dict[str, dict[int, list[float]]]) -> list[Figure]:
    """Draw all figures and the animation; `changes` are the relative changes of W2 by objective and stage."""
    mask, closed_form, trajectories = (run.figure(name) for name in ("mask", "linear", "trajectories"))
    figures.draw_change(mask, changes)
    figures.draw_linear(closed_form, *linear_curves(run), trained_sizes(run))
    shown = {"simulator": data(run)[:SHOWN].cpu()}
    shown |= {f"{o}, {m}": torch.load(samples_file(run, o, m, 0), weights_only=True) for o, m in MODELS}
    figures.draw_trajectories(trajectories, shown, run.config.every * STEP_SIZE)
    figures.animate(mask.with_name("masses.gif"), shown)
    return [
        Figure(mask, "Relative change of W2 by the causal mask over the training (Fig. 7, right); one point per seed."),
        Figure(closed_form, "Linear fields in closed form: W2 of their samples, and their size."),
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
    # The moving average of "small" spans about as many trajectories as the paper's: 1000 minibatches of 16 against 100
    # of 256. Without a warm-up one of the first two seeds stays at its start (full attention, Flux Matching: W2 is 56
    # after 5000 iterations).
    presets={
        "smoke": Config(
            seeds=1,
            data=64,
            iterations=4,
            batch=16,
            evaluations=2,
            width=16,
            blocks=1,
            heads=2,
            samples=32,
            sampling_steps=8,
            timed_steps=1,
        ),
        "small": Config(
            iterations=5000,
            batch=16,
            lr=1e-3,
            warmup=200,
            ema=0.999,
            horizon="exponential",
            width=64,
            blocks=3,
            heads=4,
            samples=500,
            sampling_steps=128,
        ),
        "paper": Config(),
    },
    main=main,
)
