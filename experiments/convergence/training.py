"""A problem, the two methods to differentiate the network, and one training of one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.common.distances import wasserstein2
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.objectives import PlainAttention, averaged_field
from experiments.common.run import Run
from experiments.common.sampling import sample_reverse_ve
from experiments.springs.simulator import trajectories
from fluxmatching import (
    EDMField,
    FluxOptions,
    LogUniformNoise,
    Trainer,
    TrainingOptions,
    TruncatedExponentialHorizon,
)
from fluxmatching.networks import Perceptron, TrajectoryTransformer

WINDOWS = 20  # of a loss curve
# The exact method and the default of the library, by the names in tables and figures.
METHODS: dict[str, str | None] = {"double backward": "double_backward", "default": None}


@dataclass(frozen=True)
class Problem:
    """Data, a network for them, and noise levels.

    Attributes:
        data: (count, generator) -> samples.
        network: (width) -> F(x, c_noise).
        noise: distribution of σ in training; the sampler has the same ends.
    """

    data: Callable[[int, torch.Generator], Tensor]
    network: Callable[[int], nn.Module]
    noise: LogUniformNoise


PROBLEMS = {
    "mixture": Problem(
        GaussianMixture(triangle_means(1.8).float(), 0.225).sample,
        lambda width: Perceptron(2, width),
        LogUniformNoise(0.02, 10.0),
    ),
    "springs": Problem(
        trajectories,
        lambda width: TrajectoryTransformer(width=width, blocks=3, heads=4),
        LogUniformNoise(0.05, 40.0),
    ),
}


def make_loss(run: Run, name: str, method: str, sigma_data: float) -> PlainAttention:
    """Make the loss module of a problem, with the network's weights drawn from torch's generator."""
    problem = PROBLEMS[name]
    field = EDMField(problem.network(run.config.size(name).width), sigma_data)
    options = FluxOptions(
        horizon=TruncatedExponentialHorizon(), strata=1, second_derivatives=METHODS[method], backend=run.backend
    )
    return PlainAttention(field, problem.noise, options)


def train(run: Run, name: str, method: str, seed: int) -> None:
    """Train once and draw samples: log the loss curve, and one row with their distance to new data.

    Both methods of one seed share weights, minibatches and all random numbers.
    """
    problem, config = PROBLEMS[name], run.config
    size = config.size(name)
    data = problem.data(config.data, run.generator("data", name)).to(run.device)
    with run.drawing("weights", name, seed):
        loss = make_loss(run, name, method, data.std().item())
    options = TrainingOptions(
        size.iterations, size.batch, lr=size.lr, optimizer="adam", ema=0.99, seed=run.seed + 1000 * seed,
        accelerator=str(run.device), progress=False,
    )  # fmt: skip
    trainer = Trainer(loss, data, options)
    losses, begun = [], time.perf_counter()
    for _ in run.bar(range(size.iterations), f"{name}, {method}, seed {seed}"):
        losses.append(trainer.step())
    curve = torch.stack(losses).cpu()  # waits for the device
    seconds = time.perf_counter() - begun

    held_out = problem.data(config.samples, run.generator("held out", name)).to(run.device)
    low, high = math.exp(problem.noise.low), math.exp(problem.noise.high)
    field, generator = averaged_field(trainer), run.generator("sample", name)
    samples = sample_reverse_ve(field, held_out, config.sampling_steps, low, high, generator)
    known = {"problem": name, "method": method, "seed": seed}
    logged = {row["window"] for row in run.rows("curve") if all(row[key] == value for key, value in known.items())}
    for window, part in enumerate(curve.chunk(WINDOWS)):
        if window not in logged:
            run.log(kind="curve", **known, window=window, loss=part.mean())
    run.log(kind="result", **known, w2=wasserstein2(samples, held_out), seconds=seconds / size.iterations)
