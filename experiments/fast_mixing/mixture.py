"""Fields of the mixture: known ones, and trained ones with and without the proxy."""

from __future__ import annotations

from typing import Any

from experiments.common.clock import Clock
from experiments.common.mixture import GaussianMixture
from experiments.common.objectives import DSM, FAST, FLUX, HORIZONS, MixingTerm, averaged_field, make_loss
from experiments.common.registry import Paused
from experiments.common.run import Run
from experiments.fast_mixing.measure import measure
from experiments.fast_mixing.problem import KNOWN, MEANS, SIGMA_MAX, SIGMA_MIN, VARIANCE
from fluxmatching import EDMField, LogUniformNoise, Trainer, TrainingOptions
from fluxmatching.networks import Perceptron


def fast(weight: float) -> str:
    """Return the name of the field trained with the proxy of that weight."""
    return f"{FAST}, λ = {weight:g}"


def trained(config: Any) -> dict[str, MixingTerm | None]:
    """Return the trained fields by name, each with the term that its loss adds."""
    if not config.with_training:
        return {}
    terms: dict[str, MixingTerm | None] = {
        fast(weight): MixingTerm(weight, config.drift_times_sigma) for weight in config.mixture_mixing_weights
    }
    return {**terms, FLUX: None, DSM: None}


def fields(config: Any) -> tuple[str, ...]:
    """Return the names of all fields."""
    return (*KNOWN, *trained(config))


def make_trainer(run: Run, name: str, seed: int, *, iterations: int) -> Trainer:
    """Make the trainer of one field; fields of one seed share initial weights, data, minibatches and noise levels."""
    config, noise, term = run.config, LogUniformNoise(SIGMA_MIN, SIGMA_MAX), trained(run.config)[name]
    with run.drawing("mixture weights", seed):
        field = EDMField(Perceptron(2, config.mixture_width), MEANS.std().item())
        horizon = HORIZONS[config.horizon](config.tau_max)
        loss = make_loss(
            name if term is None else FAST, field, noise, horizon, backend=run.backend, mixing=term or MixingTerm()
        )
    data = GaussianMixture(MEANS, VARIANCE).sample(config.mixture_data, run.generator("mixture data"))
    options = TrainingOptions(
        iterations, config.mixture_batch, lr=1e-3, warmup=100, progress=run.progress,
        seed=run.generator("mixture training", seed).initial_seed() >> 1, accelerator=str(run.device),
    )  # fmt: skip
    file = "".join(letter if letter == "." or (letter.isascii() and letter.isalnum()) else "-" for letter in name)
    return Trainer(loss, data.to(run.device), options, folder=run.out / "models" / f"mixture-{file}-{seed}")


def study(run: Run, clock: Clock) -> None:
    """Measure the known fields, then train and measure the others; fields that were measured are left out.

    Raises:
        Paused: the time is up.
    """
    done = {(row["field"], row["seed"]) for row in run.rows("mixture")}
    seeds = range(run.config.seeds)
    for name, field in KNOWN.items():
        for seed in seeds:
            if (name, seed) not in done:
                measure(run, field, name, seed)
    for seed in seeds:
        for name in trained(run.config):
            if (name, seed) in done:
                continue
            trainer = make_trainer(run, name, seed, iterations=run.config.mixture_iterations)
            trainer.run(clock.left)
            if trainer.iteration < run.config.mixture_iterations:
                raise Paused(f"mixture: {name}, seed {seed}, at iteration {trainer.iteration}")
            measure(run, averaged_field(trainer), name, seed)
