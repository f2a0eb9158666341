"""A field added to a saved pipeline of diffusers, on images whose law is known (Appendix C.4, Eq. 48)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.augment_images import figures
from experiments.augment_images.measure import measure
from experiments.augment_images.results import results
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from fluxkernels.checks import check_sigma_range


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: number of trainings, of the pipeline and of the fields on top of it.
        data: images of the trainings.
        lr, ema: of all trainings with Adam; the learning rate falls to zero along a cosine.
        channels: channels of the levels of the UNet.
        pipeline_steps, pipeline_batch: training of the pipeline.
        batch: minibatch of all other trainings.
        width: width of the networks in the plane.
        plane_steps: training of the score in the plane.
        steps: training of v.
        low, high: range of noise levels of v.
        flux_weight, defect_weight, law_weight: weights of the augmentation loss, the step defect, and the energy
            distance after four steps; that of the autocorrelation loss is 1.
        sigmas: noise levels of the chains.
        evaluations, chains: length and number of the chains per schedule.
        bias: bias at which fields are compared, and half of it.
        samples, sampling_steps: images per sampler, and its noise levels.
    """

    seeds: int = 3
    data: int = 4096
    lr: float = 3e-3
    ema: float = 0.98
    channels: tuple[int, ...] = (8, 16)
    pipeline_steps: int = 1200
    pipeline_batch: int = 64
    batch: int = 128
    width: int = 64
    plane_steps: int = 400
    steps: int = 100
    low: float = 1.5
    high: float = 3.0
    flux_weight: float = 10.0
    defect_weight: float = 1.0
    law_weight: float = 50.0
    sigmas: tuple[float, ...] = (1.75, 2.5)
    evaluations: int = 700
    chains: int = 16
    bias: float = 0.06
    samples: int = 256
    sampling_steps: int = 40

    def __post_init__(self) -> None:
        check_sizes(self, data=max(self.batch, self.pipeline_batch), batch=8, ema=0, chains=2, sampling_steps=4)
        check_sigma_range("noise levels of v", self.low, self.high)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if any(width % 4 for width in self.channels):
            raise ValueError(f"channels must be multiples of 4, got {self.channels}")


def main(run: Run) -> None:
    """Train the pipelines and the fields, measure chains and samplers, draw the figures."""
    measure(run)
    paths = {name: run.figure(name) for name in ("samples", "costs")}
    figures.draw_samples(run, paths["samples"])
    figures.draw_costs(run, paths["costs"])
    run.summary(
        results(run),
        [
            Figure(paths["samples"], "Images of every sampler, from the pipeline alone and with learned v."),
            Figure(paths["costs"], "Evaluations per independent draw against bias, one marker per schedule and seed."),
        ],
    )


EXPERIMENT = Experiment(
    name="augment_images",
    title="A field added to a saved pipeline of diffusers",
    paper="C.4, Eq. 48",
    claim=(
        "A field v with ∇·(p v) = 0, trained on top of a DDPM pipeline that was saved and loaded and stays frozen, "
        "leaves the law of the samples of every sampler as it is, and lets Langevin chains make an independent draw in "
        "fewer evaluations at the same bias. Step sizes are tuned for each field."
    ),
    presets={
        "smoke": Config(
            seeds=1, data=64, channels=(4, 4), pipeline_steps=3, pipeline_batch=8, batch=32, width=8, plane_steps=3,
            steps=2, sigmas=(2.5,), evaluations=40, chains=4, samples=16, sampling_steps=4,
        ),
        "small": Config(),
        "paper": Config(
            seeds=5, data=50_000, channels=(32, 64), pipeline_steps=50_000, pipeline_batch=256, batch=512,
            width=128, plane_steps=10_000, steps=3000, evaluations=8000, chains=256, samples=10_000,
            sampling_steps=200,
        ),
    },
    main=main,
)  # fmt: skip
