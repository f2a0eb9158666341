"""The best field of images by Flux Matching, as the example "images"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.common.export import NOISES, Measured, TrainedField, over_noises
from experiments.common.objectives import FLUX
from experiments.common.run import Run
from experiments.images.datasets import load, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import sample
from experiments.images.stages import best_field, choice, floor, reference
from experiments.images.training import network_arguments
from fluxmatching import EDMField

LIMITS = {
    "shapes": "A test of samplers, no model of photographs.",
    "cifar10": "CIFAR-10 is published for research without an explicit license.",
    "celeba64": "The owners of CelebA allow research alone.",
}


def example(run: Run) -> TrainedField:
    """Return the field with the best samples of the run."""
    config, images = run.config, load(run.config.dataset)
    shape = tuple(images.train.shape[1:])
    steps = f"{config.sampling_steps} steps" if config.sampling_steps else "adaptive steps"

    def measure(field: nn.Module) -> list[Measured]:
        # Their noise is that of batches in order, so that the first ones are those of the run.
        found = to_numbers(sample(run, field, NOISES * config.samples, shape, "samples")).split(config.samples)
        real = reference(run, images, config.samples)
        distances = [frechet_distance(random_convolutions(x), real) for x in found]
        row = next(row["distance"] for row in run.rows("final") if row["objective"] == FLUX)
        held_out = to_numbers(images.test[choice(run, len(images.test), config.samples)])
        name = (
            f"Fréchet distance on random convolutions, {config.samples} samples in {steps} to {len(real)} images of "
            f"the data (perfect model: {len(held_out)} held-out images)"
        )
        perfect = f"{floor(run, config.samples)['distance']:.2f}"
        lines = over_noises(name, distances, row, perfect, 2)
        if config.dataset == "shapes":
            for quantity, measured in (
                ("share of images whose pixels unlike the border form one piece", single_share),
                ("distance of colors from the line between two, RMS, of numbers in [-1, 1]", color_distance),
            ):
                here, there = measured(torch.cat(found)), measured(held_out)
                lines.append(Measured(quantity, f"{here:.3f}", "–", f"{there:.3f}"))
        return lines

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
        data=f"{len(images.train)} images for training: {images.source}. Bytes become numbers from -1 to 1.",
        training=(
            f"Flux Matching over many noise levels (Eq. 11) with a UNet of diffusers: {config.iterations} iterations "
            f"of {config.batch} images, moving average {config.ema:g}."
        ),
        measure=measure,
        limits=(
            "The distance on random convolutions is not an FID and not comparable with one; compare with the last "
            "column, held-out images of the data. It is larger for fewer images, and depends on which images of the "
            "data samples are compared with.",
            LIMITS[config.dataset.removesuffix("_subset")],
        ),
    )


def single_share(x: Tensor) -> float:
    """Compute the share of images `[n, 3, size, size]` whose pixels unlike the border are one connected piece.

    A pixel is unlike the border if its distance from the median color of the border is above half of the largest.
    """
    from scipy import ndimage

    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    distance = (x - border[:, :, None, None]).norm(dim=1)
    unlike = distance > distance.amax((1, 2), keepdim=True) / 2
    return sum(ndimage.label(mask, structure=[[1] * 3] * 3)[1] == 1 for mask in unlike.numpy()) / len(x)


def color_distance(x: Tensor) -> float:
    """Compute the RMS distance of the colors of an image from a line: zero for a disc and a background of one color."""
    pixels = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
    beside = torch.linalg.svdvals(pixels)[:, 1:].square().sum(1)
    return (beside.mean() / pixels.shape[2]).sqrt().item()
