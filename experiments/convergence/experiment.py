"""Convergence: the default way to differentiate the network learns what exact double backward learns."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from experiments.common.distances import wasserstein2
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure, Result
from experiments.common.run import Run
from experiments.convergence.figures import Curves, draw_curves, draw_distances
from experiments.convergence.training import METHODS, PROBLEMS, WINDOWS, train

EXACT, FAST = METHODS


@dataclass(frozen=True)
class Size:
    """Sizes of the training of one problem."""

    iterations: int
    batch: int
    width: int
    lr: float


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: trainings of each kind.
        data: training samples.
        samples: samples of a trained field, compared with as many new ones of the data.
        sampling_steps: steps of the reverse VE sampler.
        mixture_iterations: iterations in the plane.
        mixture_batch: samples per minibatch in the plane.
        mixture_width: width of the perceptron.
        mixture_lr: learning rate in the plane.
        springs_iterations: iterations on trajectories.
        springs_batch: trajectories per minibatch.
        springs_width: width of the transformer.
        springs_lr: learning rate on trajectories.
    """

    seeds: int = 5
    data: int = 2000
    samples: int = 1000
    sampling_steps: int = 128
    mixture_iterations: int = 3000
    mixture_batch: int = 256
    mixture_width: int = 128
    mixture_lr: float = 1e-3
    springs_iterations: int = 600
    springs_batch: int = 64
    springs_width: int = 64
    springs_lr: float = 1e-3

    def __post_init__(self) -> None:
        check_sizes(self, seeds=2, mixture_iterations=20, springs_iterations=20)

    def size(self, problem: str) -> Size:
        """Return the sizes of one problem."""
        return Size(*(getattr(self, f"{problem}_{name}") for name in ("iterations", "batch", "width", "lr")))


def main(run: Run) -> None:
    """Train every problem by both methods with every seed, compare, draw."""
    done = {(row["problem"], row["method"], row["seed"]) for row in run.rows("result")}
    for name in PROBLEMS:
        for seed in range(run.config.seeds):
            for method in METHODS:
                if (name, method, seed) not in done:
                    train(run, name, method, seed)
    paths = [run.figure("loss"), run.figure("distance")]
    distances = {name: {m: run.by_seed("result", "w2", problem=name, method=m) for m in METHODS} for name in PROBLEMS}
    floors = {name: floor(run, name) for name in PROBLEMS}
    all_curves = {name: {method: curves(run, name, method) for method in METHODS} for name in PROBLEMS}
    draw_curves(paths[0], all_curves, {name: run.config.size(name).iterations for name in PROBLEMS})
    draw_distances(paths[1], distances, floors)
    results = [
        result for name in PROBLEMS for result in compare(run, name, distances[name], all_curves[name], floors[name])
    ]
    run.summary(
        results,
        [
            Figure(paths[0], "Training loss (Eq. 11): mean over seeds, band one standard deviation."),
            Figure(paths[1], "Distance of generated samples to new data; lines join the two trainings of a seed."),
        ],
        (
            "Seed-to-seed spread: standard deviation over the trainings with double backward. Both methods of one seed "
            "share initial weights, minibatches and all random numbers.",
            "The training loss is normalized by a learned scale for each noise level, and can be negative.",
        ),
    )


def curves(run: Run, name: str, method: str) -> Curves:
    """Return the loss by seed and window."""
    rows = [row for row in run.rows("curve") if (row["problem"], row["method"]) == (name, method)]
    by_seed: Curves = [[] for _ in range(run.config.seeds)]
    for row in sorted(rows, key=lambda row: row["window"]):
        by_seed[row["seed"]].append(row["loss"])
    return by_seed


def floor(run: Run, name: str) -> float:
    """Compute the distance between two samples of the data itself, of the size that is compared."""
    one, other = (
        PROBLEMS[name].data(run.config.samples, run.generator(which, name)) for which in ("held out", "held out too")
    )
    return wasserstein2(one, other)


def difference_of_curves(exact: Curves, fast: Curves) -> float:
    """Compute (difference of means over seeds) / (spread of the exact curve), root-mean-square over windows."""
    ratios = [
        (statistics.mean(f) - statistics.mean(e)) / statistics.stdev(e)
        for e, f in zip(zip(*exact, strict=True), zip(*fast, strict=True), strict=True)
    ]
    return math.sqrt(statistics.mean(ratio**2 for ratio in ratios))


def compare(
    run: Run, name: str, distances: dict[str, list[float]], all_curves: dict[str, Curves], floor: float
) -> list[Result]:
    """Compare both methods on one problem."""
    exact, fast = distances[EXACT], distances[FAST]
    spread = statistics.stdev(exact)
    difference = statistics.mean(fast) - statistics.mean(exact)
    off = difference_of_curves(all_curves[EXACT], all_curves[FAST])
    seconds = {m: statistics.median(run.by_seed("result", "seconds", problem=name, method=m)) for m in METHODS}
    return [
        Result(
            f"{name}: final W2, {FAST} / {EXACT}",
            f"{statistics.mean(fast):.4f} ± {statistics.stdev(fast):.4f} / {statistics.mean(exact):.4f} ± {spread:.4f}",
        ),
        Result(
            f"{name}: difference of the two, in units of the seed-to-seed spread",
            f"{difference / spread:+.2g}",
            "criterion: within ±1",
            abs(difference) <= spread,
        ),
        Result(
            f"{name}: difference of the loss curves in that unit, root-mean-square over {WINDOWS} windows",
            f"{off:.2g}",
            "criterion: at most 1",
            off <= 1,
        ),
        Result(f"{name}: W2 of two samples of the data", f"{floor:.4f}"),
        Result(
            f"{name}: time per iteration, {EXACT} over {FAST}",
            f"{1e3 * seconds[EXACT]:.3g} ms / {1e3 * seconds[FAST]:.3g} ms = {seconds[EXACT] / seconds[FAST]:.2f} ×",
        ),
    ]


EXPERIMENT = Experiment(
    name="convergence",
    title="The default second derivatives learn what exact double backward learns",
    paper="Sec. 3.4, cost of Sec. 4.3 (a check that the paper does not make)",
    claim=(
        "Trained with the default second derivatives, a central difference of two backward passes, networks reach the "
        "same loss and the same distance to the data as with double backward, within the spread over seeds."
    ),
    presets={
        "smoke": Config(
            seeds=2, data=200, samples=50, sampling_steps=8, mixture_iterations=20, mixture_batch=32, mixture_width=16,
            springs_iterations=20, springs_batch=8, springs_width=16,
        ),
        "small": Config(),
        "paper": Config(
            mixture_iterations=20_000, springs_iterations=10_000, springs_batch=256, springs_width=512, springs_lr=3e-4,
            sampling_steps=512, samples=2000,
        ),
    },
    main=main,
)  # fmt: skip
