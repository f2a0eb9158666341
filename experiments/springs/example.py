"""The field with a causal mask by Flux Matching, as the example "springs"."""

from __future__ import annotations

from torch import nn

from experiments.common.distances import wasserstein2
from experiments.common.export import Measured, TrainedField, trained_field
from experiments.common.objectives import FLUX
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.springs.training import (
    CAUSAL,
    data,
    floor,
    fresh,
    make_trainer,
    network_arguments,
    sample,
    samples_file,
)

SEED = 0


def example(run: Run) -> TrainedField:
    """Return the field of the first seed.

    Raises:
        UsageError: the field is not in the units of the simulator, or not preconditioned.
    """
    config = run.config
    if config.standardize or not config.input_scaling:
        raise UsageError("the example springs is exported from runs without standardize and with input_scaling")

    def measure(field: nn.Module) -> list[Measured]:
        found, real = sample(run, field, SEED), fresh(run)
        known = {"objective": FLUX, "mask": CAUSAL, "iteration": config.iterations, "seed": SEED}
        (row,) = run.by_seed("model", "w2_fresh", **known)
        name = f"W2 of {config.samples} samples in {config.sampling_steps} steps to {config.data} fresh trajectories"
        return [
            Measured(name, f"{wasserstein2(found, real):.2f}", f"{row:.2f}", f"{floor(run)['w2_fresh']:.2f}"),
            Measured(
                "standard deviation of all positions and velocities", f"{found.std():.2f}", "–", f"{real.std():.2f}"
            ),
        ]

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
            "The trajectories are rough at the beginning, where the mask hides most.",
            "A small training: the claim of Fig. 7, that the mask improves Flux Matching, is not reproduced by such "
            "trainings (experiments/springs/README.md).",
            "W2 of few samples in many dimensions is large even for exact ones; compare with the last column.",
        ),
    )
