"""What is trained: a problem, the two ways to differentiate the network, and one training of one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.common.distances import wasserstein2
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.networks import Perceptron
from experiments.common.run import Run
from experiments.common.sampling import sample_reverse_ve
from experiments.springs.network import TrajectoryTransformer
from experiments.springs.simulator import trajectories
from fluxmatching import (
    EDMField,
    LogUniformNoise,
    LossNormalizer,
    Trainer,
    TrainingOptions,
    TruncatedExponentialHorizon,
    noise_annealed_flux_loss,
)
from fluxmatching.training import Loss

WINDOWS = 20  # of a loss curve


@dataclass(frozen=True)
class Problem:
    """Data, a network for them, and noise levels.

    Attributes:
        data: (count, generator) -> samples.
        network: (width) -> F(x, c_noise).
        noise: σ in training; its ends are also those of the sampler.
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


def flux(problem: Problem, run: Run, **options: Any) -> Loss:
    """The noise-annealed loss of a minibatch; σ from torch's generator, which the trainer sets."""
    horizon = TruncatedExponentialHorizon()

    def loss(model: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sigma = problem.noise.sample().to(x.device)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward; the same one for both
            found = noise_annealed_flux_loss(
                model["field"],
                x,
                sigma,
                model["normalizer"],
                horizon=horizon,
                seed=seed,
                backend=run.backend,
                **options,
            )
        return found.total, {"sigma": sigma, "tau": found.tau}

    return loss


WAYS: dict[str, dict[str, Any]] = {"double backward": {"endpoint": "reverse"}, "default": {}}


def train(run: Run, name: str, way: str, seed: int) -> None:
    """One training, then samples: logs the loss curve, and a row with the distance of samples to new data.

    Both ways of one seed share weights, minibatches and all random numbers.
    """
    problem, config = PROBLEMS[name], run.config
    size = config.size(name)
    data = problem.data(config.data, run.generator("data", name)).to(run.device)
    with run.drawing("weights", name, seed):
        field = EDMField(problem.network(size.width), data.std().item()).to(run.device)
        model = nn.ModuleDict({"field": field, "normalizer": LossNormalizer().to(run.device)})
    options = TrainingOptions(
        size.iterations, size.batch, lr=size.lr, optimizer="adam", ema=0.99, seed=run.seed + 1000 * seed, progress=False
    )
    trainer = Trainer(model, flux(problem, run, **WAYS[way]), data, options)
    losses, begun = [], time.perf_counter()
    for _ in run.bar(range(size.iterations), f"{name}, {way}, seed {seed}"):
        losses.append(trainer.step())
    seconds = time.perf_counter() - begun

    held_out = problem.data(config.samples, run.generator("held out", name)).to(run.device)
    low, high = math.exp(problem.noise.low), math.exp(problem.noise.high)
    field, generator = trainer.average.module["field"], run.generator("sample", name)
    samples = sample_reverse_ve(field, held_out, config.sampling_steps, low, high, generator)
    known = {"problem": name, "way": way, "seed": seed}
    logged = {row["window"] for row in run.rows("curve") if all(row[key] == value for key, value in known.items())}
    for window, part in enumerate(torch.tensor(losses).chunk(WINDOWS)):
        if window not in logged:
            run.log(kind="curve", **known, window=window, loss=part.mean())
    run.log(kind="result", **known, w2=wasserstein2(samples, held_out), seconds=seconds / size.iterations)
