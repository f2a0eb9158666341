"""Paths, couplings and rectified flow: how many evaluations a flow needs, on two problems in the plane."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.flows import figures
from experiments.flows.measure import (
    SOLVERS,
    TARGETS,
    TIMES,
    key_of,
    log_distances,
    log_floors,
    log_repeats,
    log_targets,
    log_trajectories,
    trajectory_file,
)
from experiments.flows.problems import CHECKERBOARD, MOONS, PROBLEMS, Problem
from experiments.flows.results import distances, floors, results, variance
from experiments.flows.training import EXACT, INDEPENDENT, RECTIFIED, Variant, train, training_data, variants

COMPARED = (INDEPENDENT, EXACT, RECTIFIED)  # in the figures of trajectories
NOTES = (
    "± is the standard error of the mean over seeds. Variants of a seed share data, initial weights, minibatches, the "
    "start of samples and the new data to compare with, so differences are taken seed by seed.",
    "bend / length: E∫|dx/dt - (x(1) - x(0))|² dt / E|x(1) - x(0)|², zero for straight lines at constant speed.",
    "rectified: trained on the pairs of the flow with independent pairs, so it has had twice the training.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: trainings of each variant.
        data: training samples, of the source also; reference points of the stable target.
        iterations: iterations of a training.
        batch: samples per minibatch.
        lr: learning rate of Adam at the start; it falls to zero along a cosine.
        ema: decay of the moving average of the weights, which is what is measured.
        width: width of the perceptron.
        samples: samples of a flow, compared with as many new ones of the data.
        evaluations: numbers of evaluations of the field per sample.
        repeats: comparisons of a flow in the most evaluations with new data, and of new data with each other.
        sections: equal steps of time at which trajectories are measured.
        shown: trajectories kept for the figures.
        minibatches: minibatches for the variance of the gradient.
    """

    seeds: int = 3
    data: int = 10_000
    iterations: int = 1200
    batch: int = 256
    lr: float = 1e-2
    ema: float = 0.995
    width: int = 128
    samples: int = 1000
    evaluations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    repeats: int = 5
    sections: int = 64
    shown: int = 300
    minibatches: int = 32

    def __post_init__(self) -> None:
        check_sizes(self, data=self.batch, ema=0, batch=2, minibatches=2)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if len(self.evaluations) < 2 or max(self.evaluations) % 2:
            raise ValueError(
                f"evaluations must be at least two numbers, the largest even, as Heun's method needs, got "
                f"{self.evaluations}"
            )


def main(run: Run) -> None:
    """Train and measure every variant with every seed, compare, draw."""
    jobs = [
        (seed, problem, variant)
        for seed in range(run.config.seeds)
        for problem in PROBLEMS
        for variant in variants(problem)
    ]
    for seed, problem, variant in run.bar(jobs, "trainings"):
        study(run, problem, variant, seed)
    run.summary(results(run), draw(run), (*NOTES, "`figures/transport.gif` shows the samples in motion."))


def study(run: Run, problem: Problem, variant: Variant, seed: int) -> None:
    """Train one variant and measure it; skip what is on disk."""
    key = key_of(problem, variant, seed)
    if any(key.items() <= row.items() for row in run.rows("trajectories")):  # the last row of a training
        return
    field = train(run, problem, variant, seed)
    log_floors(run, problem, seed)
    log_repeats(run, problem, variant, seed, field)
    log_distances(run, problem, variant, seed, field)
    if (problem, variant.name) == (CHECKERBOARD, INDEPENDENT):
        log_targets(run, training_data(run, problem, seed), seed, field)
    log_trajectories(run, problem, variant, seed, field)


def draw(run: Run) -> list[Figure]:
    """Draw all figures and the animation from the logged rows and the kept trajectories of seed 0."""
    distance, trajectories, gradient = (run.figure(name) for name in ("distance", "trajectories", "gradient"))
    panels = [
        {
            f"{problem.name}, {solver}": {
                variant.name: distances(run, problem, variant.name, solver) for variant in variants(problem)
            }
            for solver in SOLVERS
        }
        for problem in PROBLEMS
    ]
    figures.draw_distances(distance, panels, [statistics.mean(floors(run, problem)) for problem in PROBLEMS])
    shown = {
        problem.name: {
            variant.name: torch.load(trajectory_file(run, problem, variant, 0), weights_only=True)
            for variant in variants(problem)
            if variant.name in COMPARED
        }
        for problem in PROBLEMS
    }
    figures.draw_trajectories(trajectories, shown)
    figures.draw_variances(gradient, {target: {t: variance(run, target, t) for t in TIMES} for target in TARGETS})
    figures.animate(distance.with_name("transport.gif"), shown[MOONS.name])
    return [
        Figure(distance, "W2 of samples to new data by number of evaluations; dashed: more new data."),
        Figure(trajectories, "Trajectories of seed 0 from the source (red) to the data (blue)."),
        Figure(gradient, "Checkerboard: variance of the gradient of the loss by target, on the same x_t."),
    ]


EXPERIMENT = Experiment(
    name="flows",
    title="Paths, couplings and rectified flow",
    paper=(
        "which it goes beyond: flow matching (Lipman et al. 2023), couplings (Tong et al. 2024), rectified flow "
        "(Liu et al. 2023)"
    ),
    claim=(
        "Flows trained on pairs by optimal transport, and rectified flows, have straighter trajectories than flows "
        "trained on independent pairs, and sample better in one or two evaluations. With many evaluations the samples "
        "of all variants are nearly as close to the data as new data. The posterior mean as target gives the gradient "
        "less variance than a single sample does."
    ),
    presets={
        "smoke": Config(
            seeds=2, data=200, iterations=4, batch=32, width=16, samples=60, evaluations=(1, 2, 4), repeats=2,
            sections=6, shown=40, minibatches=3,
        ),
        "small": Config(),
        "paper": Config(seeds=5, data=50_000, iterations=20_000, batch=1024, ema=0.999, width=256, samples=2000),
    },
    main=main,
)  # fmt: skip
