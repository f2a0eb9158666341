"""Bias and noise of every estimator of the gradient, for a field at several stages of a training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.run import Run
from experiments.critic.methods import (
    CONTROL,
    CROSS,
    DSM,
    FEATURES,
    FOLLOWERS,
    LEARNED,
    SINGLE,
    ControlVariate,
    LearnedTarget,
    Learning,
    Method,
    make_method,
)
from experiments.critic.problems import MIXTURE, SPRINGS, Problem, make_problem
from experiments.critic.training import base_sizes, cost

REFERENCE_LR = {MIXTURE: 3e-3, SPRINGS: 1e-2}  # of the training, by the cross-chain estimator, that makes the stages
SIDE_LR = 3e-3  # of the critics and of the learned q that follow it


def flat_gradient(field: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient in all parameters, `[P]` float64."""
    parts = torch.autograd.grad(loss, list(field.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


def draw_gradients(field: nn.Module, method: Method, count: int, generator: torch.Generator) -> Tensor:
    """Return the gradients of as many minibatches, `[count, P]`."""
    return torch.stack([flat_gradient(field, method.loss(field, generator)) for _ in range(count)])


def describe(samples: Tensor, truth: Tensor | None, mean: Tensor | None = None) -> dict[str, float]:
    """Return error and cosine of the mean gradient and the signal-to-noise ratio of one minibatch.

    The signal is the part of the mean along the exact gradient, squared, and the noise the trace of the covariance.
    The noise of the estimated mean is subtracted from squares of it, but the cosine stays at most 1.

    Args:
        samples: gradients of minibatches, `[B, P]`.
        truth: exact gradient, `[P]`; None for score matching, whose signal is its own mean.
        mean: exact mean of the samples, if it is known.
    """
    noise = samples.var(0).sum().item()
    left = noise / len(samples) if mean is None else 0.0
    mean = samples.mean(0) if mean is None else mean
    square = max(mean.square().sum().item() - left, 1e-30)
    if truth is None:
        return {"snr": square / noise}
    size = truth.norm().item()
    along = (mean @ truth).item() / size
    error = max((mean - truth).square().sum().item() - left, 0.0)
    return {
        "error": math.sqrt(error) / size,
        "cosine": along / math.sqrt(max(square, along**2)),
        "snr": along**2 / noise,
    }


def at_stage(
    run: Run, name: str, problem: Problem, field: nn.Module, followers: dict[str, Learning], seed: int, stage: int
) -> list[dict[str, Any]]:
    """Return the rows of all estimators at one stage."""
    config, sizes = run.config, base_sizes(run, name)
    generator = run.generator("estimates", name, seed, stage)
    loss, value = problem.exact_loss(field)
    truth = flat_gradient(field, loss)
    rows: list[dict[str, Any]] = []

    def add(method: str, estimator: Method, k: int, adaptations: int, mean: Tensor | None = None) -> None:
        samples = draw_gradients(field, estimator, config.minibatches, generator)
        adapt, step = cost(run, name, method, 0)
        seconds = adaptations * adapt + step
        found = describe(samples, None if method == DSM else truth, mean)
        rows.append({"method": method, "k": k, "seconds": seconds, "rate": found["snr"] / seconds, **found})

    for method in (CROSS, SINGLE, FEATURES, DSM):
        add(method, make_method(method, problem, sizes, 0.0), 0, 0)
    learned = followers[LEARNED]
    assert isinstance(learned, LearnedTarget)
    add(CONTROL, ControlVariate(learned), 0, config.adaptations)
    for method, follower in followers.items():
        follower, taken = follower.duplicate(), 0
        for k in config.extra:
            for _ in range(k - taken):
                follower.adapt(field, generator)
            taken = k
            mean = flat_gradient(field, problem.paired(field, follower.values))
            add(method, follower, k, config.adaptations + k, mean)
    return [{"problem": name, "seed": seed, "stage": stage, "loss": value, **row} for row in rows]


def measure_seed(run: Run, name: str, problem: Problem, seed: int) -> None:
    """Train by the cross-chain estimator while the critics follow, and log rows "estimate" at every stage."""
    config, sizes = run.config, base_sizes(run, name)
    keys = ("stage", "method", "k")
    rows = [row for row in run.rows("estimate") if (row["problem"], row["seed"]) == (name, seed)]
    done = {tuple(row[key] for key in keys) for row in rows}
    if (config.stages[-1], FOLLOWERS[-1], config.extra[-1]) in done:
        return
    with run.drawing("stages", name, seed):
        field = problem.make_field()
        followers = {method: make_method(method, problem, sizes, SIDE_LR) for method in FOLLOWERS}
    learning = {method: follower for method, follower in followers.items() if isinstance(follower, Learning)}
    chains = make_method(CROSS, problem, sizes, 0.0)
    optimizer = torch.optim.Adam(field.parameters(), REFERENCE_LR[name])
    generator = run.generator("stages", name, seed)
    for step in run.bar(range(config.stages[-1] + 1), f"{name}, seed {seed}: stages"):
        if step in config.stages:
            for row in at_stage(run, name, problem, field, learning, seed, step):
                if tuple(row[key] for key in keys) not in done:
                    run.log(kind="estimate", **row)
        optimizer.zero_grad()
        chains.loss(field, generator).backward()
        optimizer.step()
        for follower in learning.values():
            for _ in range(config.adaptations):
                follower.adapt(field, generator)


def study(run: Run, name: str) -> None:
    """Measure all estimators on a problem; the costs of their steps must have been logged."""
    problem = make_problem(name, cells=run.config.cells, chains=1, chain_steps=1)
    for seed in range(run.config.seeds):
        measure_seed(run, name, problem, seed)
