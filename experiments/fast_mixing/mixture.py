"""Fields of a 2-D mixture with known noised densities: how fast they mix, and whether they preserve p_σ."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.common.autocorrelation import integrated_autocorrelation_time
from experiments.common.clock import Clock
from experiments.common.distances import wasserstein2
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.networks import Perceptron
from experiments.common.objectives import HORIZONS, OBJECTIVES, averaged_field, make_loss
from experiments.common.registry import Paused
from experiments.common.rotation import quarter_turn
from experiments.common.run import Run
from fluxmatching import (
    EDMField,
    LogUniformNoise,
    Trainer,
    TrainingOptions,
    exponential_schedule,
    mixing_loss,
    predictor_corrector,
    unadjusted_langevin,
)

EXACT, CIRCULATING = "exact score", "exact, circulating"
MEANS, VARIANCE = triangle_means(1.8).float(), 0.05
SIGMA_MIN, SIGMA_MAX = 0.05, 10.0
Field = Callable[[Tensor, Tensor], Tensor]


def noised(sigma: float) -> GaussianMixture:
    """The density p_σ."""
    return GaussianMixture(MEANS, VARIANCE + sigma**2)


def exact_score(z: Tensor, sigma: Tensor) -> Tensor:
    """∇ log p_σ."""
    return noised(float(sigma)).score(z.cpu()).to(z)


def circulating(z: Tensor, sigma: Tensor) -> Tensor:
    """s + Js with a quarter turn J: ∇·(p Js) = ∇·(J∇p) = 0, so it preserves p_σ like the score s; not reversible."""
    score = exact_score(z, sigma)
    return score + quarter_turn(score)


KNOWN: dict[str, Field] = {EXACT: exact_score, CIRCULATING: circulating}
FIELDS = (*OBJECTIVES, *KNOWN)


def make_trainer(run: Run, objective: str, seed: int, *, iterations: int, backend: str | None = None) -> Trainer:
    """A trainer of one field; fields of one seed share initial weights, data, minibatches and noise levels."""
    config, noise = run.config, LogUniformNoise(SIGMA_MIN, SIGMA_MAX)
    chosen = {"backend": backend or run.backend, "mixing_weight": config.mixture_mixing_weight}
    with run.drawing("mixture weights", seed):
        field = EDMField(Perceptron(2, config.mixture_width), MEANS.std().item())
        loss = make_loss(objective, field, noise, HORIZONS[config.horizon](config.tau_max), **chosen)
    data = GaussianMixture(MEANS, VARIANCE).sample(config.mixture_data, run.generator("mixture data"))
    options = TrainingOptions(
        iterations, config.mixture_batch, lr=1e-3, ema=0.999, warmup=100, progress=run.progress and backend is None,
        seed=run.generator("mixture training", seed).initial_seed() >> 1, accelerator=str(run.device),
    )  # fmt: skip
    folder = None if backend else run.out / "models" / f"mixture-{objective.replace(' ', '-')}-{seed}"
    return Trainer(loss, data.to(run.device), options, folder=folder)


def study(run: Run, clock: Clock) -> None:
    """Train the fields that are missing; log samples by number of steps, mixing and bias of every field.

    Raises:
        Paused: the time is up.
    """
    done = {(row["field"], row["seed"]) for row in run.rows("mixture")}
    for seed in range(run.config.seeds):
        for name in FIELDS:
            if (name, seed) in done:
                continue
            field: nn.Module | Field
            if name in KNOWN:
                field = KNOWN[name]
            else:
                trainer = make_trainer(run, name, seed, iterations=run.config.mixture_iterations)
                trainer.run(clock.left)
                if trainer.iteration < run.config.mixture_iterations:
                    raise Paused(f"mixture: {name}, seed {seed}, at iteration {trainer.iteration}")
                field = averaged_field(trainer)
            measure(run, field, name, seed)


def measure(run: Run, field: Field, name: str, seed: int) -> None:
    """Log rows "steps" (W2 by number of steps), then one row "mixture": mixing and bias at `mixture_sigma`."""
    config = run.config
    logged = {row["steps"] for row in run.rows("steps") if (row["field"], row["seed"]) == (name, seed)}
    target = noised(SIGMA_MIN).sample(config.mixture_samples, run.generator("target", seed))
    for num_steps in config.mixture_steps:
        if num_steps in logged:
            continue
        generator = run.generator("start", seed, num_steps)  # the same noise for all fields
        start = (SIGMA_MAX * torch.randn(config.mixture_samples, 2, generator=generator)).to(run.device)
        noise = run.device_generator("noise", seed, num_steps)
        sigmas = exponential_schedule(num_steps, SIGMA_MIN, SIGMA_MAX)
        found = predictor_corrector(field, start, sigmas, generator=noise)
        run.log(kind="steps", field=name, seed=seed, steps=num_steps, w2=wasserstein2(found, target))
    sigma = config.mixture_sigma
    level = torch.tensor(sigma, device=run.device)
    minibatches = [noised(0.0).sample(256, run.generator("ratio", seed, k)).to(run.device) for k in range(20)]
    # The loss repeats a minibatch's one number for every sample of it.
    ratios = [mixing_loss(field, x, sigma, seed=k)[0] for k, x in enumerate(minibatches)]
    time, end = chains(run, lambda z: field(z, level), seed)
    exact = noised(sigma).sample(len(end), run.generator("stationary", seed))
    ratio = sum(ratios, torch.zeros((), device=run.device)).item() / len(ratios)
    run.log(kind="mixture", field=name, seed=seed, time=time, bias=wasserstein2(end, exact), ratio=ratio)


def chains(run: Run, field: Callable[[Tensor], Tensor], seed: int) -> tuple[float, Tensor]:
    """Run Langevin chains from exact samples at `mixture_sigma`; returns the autocorrelation time (σ²) and their ends.

    The time is the larger of the two coordinates' times; infinite if the chains are too short to measure it.
    """
    config = run.config
    sigma, step_size = config.mixture_sigma, config.langevin_step_size * config.mixture_sigma**2
    start = noised(sigma).sample(config.chains, run.generator("chains", seed)).to(run.device)
    path: list[Tensor] = []
    noise = run.device_generator("chain noise", seed)
    end = unadjusted_langevin(
        field,
        start,
        step_size=step_size,
        num_steps=config.chain_steps,
        generator=noise,
        callback=lambda _, x: path.append(x.cpu()),
    )
    states = torch.stack(path)
    try:
        times = [integrated_autocorrelation_time(states[..., d]) for d in range(2)]
    except ValueError:  # the chains are too short to measure it
        return math.inf, end.cpu()
    return max(times) * config.langevin_step_size, end.cpu()
