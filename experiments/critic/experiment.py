"""The dual of the flux loss with a network as critic, beside the estimates from chains."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.critic import figures, measure, training
from experiments.critic.problems import MIXTURE, NAMES
from experiments.critic.results import results

NOTES = (
    "J is the projected Fisher divergence, σ² J has no dimension. CPU seconds are of one thread: medians of steps in "
    "which all methods take turns, so other load on the machine affects all equally.",
    "All work is on the CPU, whatever the device.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: trainings of every method, and of the fields at which estimates are measured.
        batch: samples per minibatch.
        width, depth: hidden layers of the critic and of the learned q.
        probes: random directions of the critic's loss for springs; all axes in the plane.
        refs: reference points of the density estimate of springs, where they are more than the minibatch.
        cells: cells along each side of the grids for exact answers in the plane.
        chains, chain_steps: Langevin chains of the final W2 in the plane.
        rounds: rounds in which steps are timed.
        mixture_seconds, springs_seconds: CPU seconds of a training.
        stages: steps of the training at whose field estimates are measured.
        adaptations: steps of the critic per step of that training.
        extra: further steps of the critic at the fixed field, increasing.
        minibatches: gradients per estimate.
    """

    seeds: int = 3
    batch: int = 256
    width: int = 64
    depth: int = 2
    probes: int = 4
    refs: int = 1024
    cells: int = 120
    chains: int = 1000
    chain_steps: int = 300
    rounds: int = 15
    mixture_seconds: float = 3.0
    springs_seconds: float = 1.5
    stages: tuple[int, ...] = (20, 100, 300)
    adaptations: int = 2
    extra: tuple[int, ...] = (0, 2, 10, 100)
    minibatches: int = 32

    def __post_init__(self) -> None:
        check_sizes(self, probes=0, extra=0, minibatches=2, batch=48, stages=0)
        for name in ("stages", "extra"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"{name} must increase, got {getattr(self, name)}")

    def seconds(self, name: str) -> float:
        """Return the CPU seconds of a training on a problem."""
        return self.mixture_seconds if name == MIXTURE else self.springs_seconds


def main(run: Run) -> None:
    """Train by every method, measure the estimates, draw, and summarize."""
    for name in NAMES:
        training.study(run, name)
        measure.study(run, name)
    run.summary(results(run), draw(run), NOTES)


def draw(run: Run) -> list[Figure]:
    """Draw all figures and return them with their captions."""
    paths = {name: run.figure(name) for name in ("estimates", "steps", "curves")}
    figures.draw_estimates(paths["estimates"], run)
    figures.draw_steps(paths["steps"], run)
    figures.draw_curves(paths["curves"], run)
    return [
        Figure(
            paths["estimates"],
            "Relative error of the mean gradient, cosine of one minibatch, and signal-to-noise ratio per second.",
        ),
        Figure(paths["steps"], "Relative error of the gradient against further steps at the fixed field."),
        Figure(paths["curves"], "σ² J and distance of the law that the field keeps against CPU seconds."),
    ]


EXPERIMENT = Experiment(
    name="critic",
    title="The dual of the flux loss with a network as critic",
    paper="(ours) dual of the flux loss",
    claim=(
        "A network as the test function of the dual estimates the gradient of the flux loss with more signal per "
        "second than chains, and trains faster; so does a network that learns the average of q̂."
    ),
    presets={
        "smoke": Config(
            seeds=1, batch=64, width=8, refs=64, cells=30, chains=50, chain_steps=5, rounds=1, mixture_seconds=0.02,
            springs_seconds=0.02, stages=(1, 3), adaptations=1, extra=(0, 2), minibatches=3,
        ),
        "small": Config(),
        "paper": Config(
            seeds=5, mixture_seconds=120.0, springs_seconds=60.0, stages=(100, 1000, 10_000), minibatches=500,
        ),
    },
    main=main,
)  # fmt: skip
