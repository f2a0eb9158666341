"""The field of the mixture by Flux Matching alone, as the example "mixture"."""

from __future__ import annotations

import math

import torch
from torch import nn

from experiments.common.export import NOISES, Measured, TrainedField, over_noises, trained_field
from experiments.common.objectives import FLUX
from experiments.common.registry import UsageError
from experiments.common.results import spread
from experiments.common.run import Run
from experiments.fast_mixing.measure import distance_to_data, judge
from experiments.fast_mixing.mixture import make_trainer
from experiments.fast_mixing.problem import MEANS, SIGMA_MAX, SIGMA_MIN, VARIANCE, noised
from experiments.fast_mixing.steps import FIXED_ON_MIXTURE, PAPER

SEED, STEPS = 0, FIXED_ON_MIXTURE[PAPER]


def example(run: Run) -> TrainedField:
    """Return the field of the first seed.

    Raises:
        UsageError: the run trained none.
    """
    config, num_steps = run.config, max(run.config.mixture_steps)
    if not config.with_training:
        raise UsageError("the run trained no field of the mixture")

    def measure(field: nn.Module) -> list[Measured]:
        count, seeds = config.mixture_samples, range(SEED, SEED + NOISES)
        found = [judge(run, field, num_steps, STEPS, count, "start", seed) for seed in seeds]
        (row,) = run.by_seed("steps", "distance", field=FLUX, procedure=PAPER, steps=num_steps, seed=SEED)
        exact = [
            distance_to_data(noised(SIGMA_MIN).sample(count, run.generator("floor", seed)), SIGMA_MIN) for seed in seeds
        ]
        name = f"sliced W2 of {count} samples to the data at sigma_min, in {num_steps} steps of Algorithm 3"
        lines = over_noises(name, found, row, spread(exact, ".3f"), 3)
        perfect = f"{math.sqrt(VARIANCE + SIGMA_MIN**2):.3f}"
        for steps in (num_steps, 10 * num_steps):
            quantity = f"standard deviation about the nearest mean, per coordinate, in {steps} steps"
            lines.append(Measured(quantity, f"{deviation(run, field, steps):.3f}", "–", perfect))
        return lines

    iterations = config.mixture_iterations
    return TrainedField(
        name="mixture",
        field=trained_field(make_trainer(run, FLUX, SEED, iterations=iterations), iterations),
        arguments={"dim": 2, "width": config.mixture_width},
        shape=(2,),
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
        sampler="predictor_corrector",
        schedule="exponential_schedule",
        num_steps=num_steps,
        data=(
            f"{config.mixture_data} points of three Gaussians of variance 0.05 in the plane, of equal weight, with "
            "means at the corners of an equilateral triangle at distance 1.8 from the origin, one of them above it."
        ),
        training=(
            f"Flux Matching over many noise levels (Eq. 11): {iterations} iterations of {config.mixture_batch} points, "
            "a perceptron of three hidden layers, and the moving average of its weights."
        ),
        measure=measure,
        limits=(
            f"The shares of the three Gaussians among {config.mixture_samples} samples fluctuate from draw to draw, "
            "and the sliced W2 with them. Differences within the deviations of the table mean nothing; fewer samples "
            "have larger deviations, and a larger mean too.",
            "The standard deviation about the means depends on the number of steps, as the table shows.",
            "Samples have the noise of sigma_min, 0.05, which the distribution they are compared with has too.",
        ),
    )


def deviation(run: Run, field: nn.Module, num_steps: int) -> float:
    """Compute the standard deviation of samples about the nearest of the three means, per coordinate."""
    generator = run.generator("deviation", num_steps)
    start = SIGMA_MAX * torch.randn(run.config.mixture_samples, 2, generator=generator)
    noise = run.device_generator("deviation noise", num_steps)
    found = STEPS.sample(field, start.to(run.device), num_steps, (SIGMA_MIN, SIGMA_MAX), noise).cpu()
    return torch.cdist(found, MEANS).amin(1).square().mean().div(2).sqrt().item()
