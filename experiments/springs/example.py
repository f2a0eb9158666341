"""The field with a causal mask by Flux Matching, as the example "springs"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.common.distances import wasserstein2
from experiments.common.export import NOISES, Measured, TrainedField, over_noises, trained_field
from experiments.common.objectives import FLUX
from experiments.common.registry import UsageError
from experiments.common.results import spread
from experiments.common.run import Run
from experiments.springs.training import (
    CAUSAL,
    data,
    fresh,
    make_trainer,
    network_arguments,
    sample,
    samples_file,
    simulate,
)

SEED = 0
PLACES = ("first", "middle", "last")


def example(run: Run) -> TrainedField:
    """Return the field of the first seed.

    Raises:
        UsageError: the field is not in the units of the simulator, or not preconditioned.
    """
    config = run.config
    if config.standardize or not config.input_scaling:
        raise UsageError("the example springs is exported from runs without standardize and with input_scaling")

    def measure(field: nn.Module) -> list[Measured]:
        found, real = [sample(run, field, seed) for seed in range(SEED, SEED + NOISES)], fresh(run)
        exact = [simulate(run, config.samples, "new" if k == 0 else f"new {k}") for k in range(NOISES)]
        distances, perfect = ([wasserstein2(x, real) for x in draws] for draws in (found, exact))
        known = {"objective": FLUX, "mask": CAUSAL, "iteration": config.iterations, "seed": SEED}
        (row,) = run.by_seed("model", "w2_fresh", **known)
        name = f"W2 of {config.samples} samples in {config.sampling_steps} steps to {config.data} fresh trajectories"
        lines = over_noises(name, distances, row, spread(perfect, ".2f"), 2)
        for quantity, measured in (("standard deviation", deviation), ("RMS second difference in time", roughness)):
            for place, here, there in zip(PLACES, measured(torch.cat(found)), measured(real), strict=True):
                lines.append(Measured(f"{quantity}, {place} point", f"{here:.2f}", "–", f"{there:.2f}"))
        return lines

    folder, iterations = samples_file(run, FLUX, CAUSAL, SEED).parent, config.iterations
    trainer = make_trainer(run, FLUX, CAUSAL, SEED, iterations=iterations, folder=folder)
    return TrainedField(
        name="springs",
        field=trained_field(trainer, iterations),
        arguments=network_arguments(run, CAUSAL),
        shape=tuple(data(run).shape[1:]),
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        sampler="reverse_ve",
        schedule="exponential_schedule",
        num_steps=config.sampling_steps,
        data=(
            f"{config.data} simulated trajectories of two masses between nonlinear springs (Eq. 46), "
            f"{data(run).shape[1]} points of time, {0.1 * config.every:g} apart, with position and velocity of each "
            "mass: q1, v1, q2, v2."
        ),
        training=(
            f"Flux Matching over many noise levels (Eq. 11) with a causal transformer, of which a point of time sees "
            f"only itself and earlier ones: {iterations} iterations of {config.batch} trajectories, moving average "
            f"{config.ema:g}."
        ),
        measure=measure,
        limits=(
            "Compare roughness (second differences) and spread over time with the last column before samples are used "
            "as trajectories.",
            "The causal mask is no recommendation: that it improves Flux Matching (Fig. 7) was not reproduced "
            "(experiments/springs/README.md in the repository).",
            "W2 of few samples in many dimensions is large even for exact ones; compare with the last column.",
        ),
    )


def deviation(x: Tensor) -> list[float]:
    """Compute the standard deviation of trajectories `[n, points, 4]` at three points."""
    return [found.std().item() for found in at_places(x)]


def roughness(x: Tensor) -> list[float]:
    """Compute the root mean square of second differences in time at three of them; nan if there are none."""
    return [found.square().mean().sqrt().item() for found in at_places(x.diff(n=2, dim=1))]


def at_places(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first, the middle and the last point of trajectories, empty if they have none."""
    middle = x.shape[1] // 2
    return x[:, :1], x[:, middle : middle + 1], x[:, -1:]
