"""The models: Flux Matching with either horizon and score matching, each with full and with causal attention."""

from __future__ import annotations

import re
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from experiments.common.distances import wasserstein2
from experiments.common.objectives import DSM, FLUX, make_loss, make_model
from experiments.common.run import Run
from experiments.common.sampling import sample_reverse_ve
from experiments.springs.network import TrajectoryTransformer
from experiments.springs.simulator import trajectories
from fluxmatching import LearnedHorizon, LogUniformNoise, Trainer, TrainingOptions, UniformHorizon

# The paper does not say which horizon it uses here, and the answer depends on it.
UNIFORM, LEARNED = "flux, uniform horizon", "flux, learned horizon"
HORIZONS = {UNIFORM: UniformHorizon, LEARNED: LearnedHorizon, DSM: LearnedHorizon}  # score matching has none
OBJECTIVES = tuple(HORIZONS)
FULL, CAUSAL = MASKS = ("full", "causal")
MODELS = tuple(product(OBJECTIVES, MASKS))
SHOWN = 64  # generated trajectories that a run keeps


def data(run: Run) -> Tensor:
    """The training trajectories, `[data, 50, 4]`."""
    return trajectories(run.config.data, run.generator("data")).to(run.device)


def make_trainer(
    run: Run, objective: str, mask: str, seed: int, *, backend: str | None = None, folder: Path | None = None
) -> Trainer:
    """Of one model; those of a seed share the field's initial weights, minibatches and noise levels."""
    config, samples = run.config, data(run)
    with run.drawing("weights", seed):
        network = TrajectoryTransformer(
            width=config.width, blocks=config.blocks, heads=config.heads, causal=mask == CAUSAL
        )
        model = make_model(network, samples.std().item(), HORIZONS[objective](tau_max=config.tau_max))
    options = TrainingOptions(
        config.iterations, config.batch, lr=config.lr, optimizer="adam", ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1,
        progress=run.progress and folder is not None,
    )  # fmt: skip
    noise = LogUniformNoise(config.sigma_min, config.sigma_max)
    loss = make_loss(DSM if objective == DSM else FLUX, noise, backend=backend or run.backend)
    return Trainer(model.to(run.device), loss, samples, options, folder=folder)


def train(run: Run, objective: str, mask: str, seed: int) -> None:
    """One training, then samples: logs W2 to the training trajectories, and keeps some samples for figures."""
    one = make_trainer(run, objective, mask, seed, folder=samples_file(run, objective, mask, seed).parent)
    begun, before = time.perf_counter(), one.iteration
    one.run()
    seconds = time.perf_counter() - begun
    config, trained = run.config, one.average.module["field"]
    like = one.data[:1].expand(config.samples, -1, -1)
    generator = run.generator("sample", seed)  # the same noise for all models of a seed
    found = sample_reverse_ve(trained, like, config.sampling_steps, config.sigma_min, config.sigma_max, generator)
    torch.save(found[:SHOWN].cpu(), samples_file(run, objective, mask, seed))
    done = config.iterations - before
    run.log(
        kind="model",
        objective=objective,
        mask=mask,
        seed=seed,
        w2=wasserstein2(found, one.data),
        seconds=seconds / done if done else None,
    )


def samples_file(run: Run, objective: str, mask: str, seed: int) -> Path:
    """Where some generated trajectories of a model are kept."""
    name = re.sub(r"\W+", "-", objective)
    return run.out / "models" / f"{name}-{mask}-{seed}" / "samples.pt"


def floor(run: Run) -> float:
    """W2 of new trajectories, as many as are sampled, to the training ones: what a perfect model has."""
    return wasserstein2(trajectories(run.config.samples, run.generator("new")), data(run))
