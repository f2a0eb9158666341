"""The best field of images by Flux Matching, as the example "images"."""

from __future__ import annotations

from torch import nn

from experiments.common.export import Measured, TrainedField
from experiments.common.objectives import FLUX
from experiments.common.run import Run
from experiments.images.datasets import load, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import sample
from experiments.images.stages import best_field, floor, reference
from experiments.images.training import network_arguments
from fluxmatching import EDMField

SMALL = "A small training: samples have layout and colors of photographs, and no objects."
LIMITS = {
    "shapes": (
        "A disc of the data has one color; those of a small training have several, and some images have two discs.",
        "A test of samplers, no model of photographs.",
    ),
    "cifar10": (SMALL, "CIFAR-10 is published for research without an explicit license."),
    "celeba64": (SMALL, "The owners of CelebA allow research alone."),
}


def example(run: Run) -> TrainedField:
    """Return the field with the best samples of the run."""
    config, images = run.config, load(run.config.dataset)
    shape = tuple(images.train.shape[1:])
    steps = f"{config.sampling_steps} steps" if config.sampling_steps else "adaptive steps"

    def measure(field: nn.Module) -> list[Measured]:
        found = random_convolutions(to_numbers(sample(run, field, config.samples, shape, "samples")))
        distance = frechet_distance(found, reference(run, images, config.samples))
        row = next(row["distance"] for row in run.rows("final") if row["objective"] == FLUX)
        real = floor(run, config.samples)["distance"]
        name = f"Fréchet distance on random convolutions, {config.samples} images in {steps}"
        return [Measured(name, f"{distance:.3f}", f"{row:.3f}", f"{real:.3f}")]

    field = best_field(run, FLUX, images)
    assert isinstance(field, EDMField)
    return TrainedField(
        name="images",
        field=field,
        arguments=network_arguments(run, shape[-1]),
        shape=shape,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        sampler="edm_heun",
        schedule="karras_schedule",
        num_steps=config.sampling_steps or 18,
        data=f"{images.source[0].upper()}{images.source[1:]}. Bytes are scaled to [-1, 1].",
        training=(
            f"Flux Matching over many noise levels (Eq. 11) with a UNet of diffusers: {config.iterations} iterations "
            f"of {config.batch} images, moving average {config.ema:g}."
        ),
        measure=measure,
        limits=(
            "The distance on random convolutions is not an FID and not comparable with one; compare with the last "
            "column, held-out images of the data.",
            *LIMITS[config.dataset.removesuffix("_subset")],
        ),
    )
