"""Fields trained to mix fast (Sec. 4.4, B.4, Fig. 6), on a mixture with exact answers and on images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from experiments.common.clock import Clock
from experiments.common.distances import wasserstein2
from experiments.common.objectives import OBJECTIVES
from experiments.common.registry import Experiment
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.common.timing import log_steps
from experiments.fast_mixing import figures, mixture, pictures
from experiments.fast_mixing.results import distance, results
from experiments.images import config as images
from experiments.images import fidelity
from experiments.images.datasets import load
from experiments.images.figures import draw_rows
from experiments.images.stages import floor
from experiments.images.training import make_trainer


@dataclass(frozen=True)
class Config(images.Config):
    """Sizes of the experiment. All fields of `images` except likelihood_images are used; additional fields:

    Args:
        samples: number of samples per field and number of steps.
        mixing_weight: λ of Eq. 45, for images.
        steps: numbers of predictor-corrector steps for images.
        seeds: trainings of each field of the mixture.
        mixture_data, mixture_iterations, mixture_batch, mixture_width: sizes of the trainings on the mixture.
        mixture_mixing_weight: λ for the mixture; the paper's 0.01 has no measurable effect there.
        mixture_steps, mixture_samples: numbers of predictor-corrector steps for the mixture, and of samples.
        mixture_sigma: noise level of the Langevin chains.
        chains, chain_steps, langevin_step_size: chains for the autocorrelation time; the step size in units of σ².
    """

    samples: int = 1000
    mixing_weight: float = 0.01
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    seeds: int = 5
    mixture_data: int = 10_000
    mixture_iterations: int = 20_000
    mixture_batch: int = 256
    mixture_width: int = 128
    mixture_mixing_weight: float = 3.0
    mixture_steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    mixture_samples: int = 2000
    mixture_sigma: float = 0.7
    chains: int = 500
    chain_steps: int = 8000
    langevin_step_size: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.steps and self.mixture_steps):
            raise ValueError("steps and mixture_steps must not be empty")
        for name in ("batch", "mixture_batch"):
            if getattr(self, name) < 4:  # the proxy compares two halves of a minibatch
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}")
        if self.mixture_data < self.mixture_batch:
            raise ValueError(f"mixture_data must be at least mixture_batch, got {self.mixture_data}")

    def loss_options(self) -> dict[str, Any]:
        return {**super().loss_options(), "mixing_weight": self.mixing_weight}


def main(run: Run) -> None:
    """Study the mixture, then images, and draw the figures."""
    config, clock = run.config, Clock.start(run.config.minutes)
    if config.fid:
        fidelity.check(config.inception_weights)
    data = load(config.dataset)
    log_steps(run, OBJECTIVES, lambda o, b: make_trainer(run, o, data, iterations=10**9, backend=b), config.timed_steps)
    mixture.study(run, clock)
    if not run.rows("mixture floor"):
        exact = mixture.noised(mixture.SIGMA_MIN)
        draws = [exact.sample(config.mixture_samples, run.generator("floor", k)) for k in range(2)]
        run.log(kind="mixture floor", w2=wasserstein2(*draws))
    pictures.study(run, data, clock)
    draw(run)
    run.summary(
        results(run),
        [
            Figure(run.figure("steps"), "Images: Fréchet distance on random convolutions by number of steps (Fig. 6)."),
            Figure(run.figure("pictures"), "Images from the same noise in few steps."),
            Figure(run.figure("mixture"), "Mixture: W2 to exact samples by number of steps."),
            Figure(
                run.figure("mixing"),
                "Mixture: autocorrelation time of Langevin chains, proxy, and bias of the chains.",
            ),
        ],
        (
            f"Data: {data.source}.",
            "The distance on random convolutions is not an FID and not comparable with one.",
        ),
    )


def draw(run: Run) -> None:
    """Draw all figures from the logged rows."""
    config = run.config
    by_field = {
        name: {k: run.by_seed("steps", "w2", field=name, steps=k) for k in config.mixture_steps}
        for name in (*OBJECTIVES, mixture.EXACT)
    }
    exact = run.rows("mixture floor")[0]["w2"]
    figures.draw_curves(run.figure("mixture"), by_field, exact, "exact samples", "W2 to exact samples")
    columns = [
        {name: run.by_seed("mixture", column, field=name) for name in mixture.FIELDS}
        for column in ("time", "ratio", "bias")
    ]
    figures.draw_mixing(run.figure("mixing"), *columns)
    curves = {name: {k: [distance(run, name, k)] for k in config.steps} for name in OBJECTIVES}
    real = floor(run, config.samples)["distance"]
    figures.draw_curves(run.figure("steps"), curves, real, "real images", "Fréchet distance, random convolutions")
    shown = {
        name: {k: torch.load(pictures.shown_file(run, name, k), weights_only=True) for k in config.steps}
        for name in OBJECTIVES
    }
    draw_rows(run.figure("pictures"), shown, "steps")


def _like(config: images.Config, **changes: Any) -> Config:
    """The preset of `images`, with this experiment's fields and the given changes."""
    return Config(**(dataclasses.asdict(config) | changes))


EXPERIMENT = Experiment(
    name="fast_mixing",
    title="Fields that mix fast, for sampling in few steps",
    paper="Sec. 4.4, B.4, Fig. 6",
    claim=(
        "With the mixing proxy added, Flux Matching learns fields that mix faster. In few predictor-corrector steps "
        "they sample better than Flux Matching alone, which samples better than score matching."
    ),
    presets={
        "smoke": _like(
            images.SMOKE, evaluations=1, steps=(2, 3), seeds=1, mixture_data=500, mixture_iterations=5,
            mixture_batch=32, mixture_width=8, mixture_steps=(2, 4), mixture_samples=50, chains=50, chain_steps=4000,
            mixture_sigma=1.5,
        ),
        "small": _like(
            images.SMALL, iterations=2000, evaluations=1, samples=500, steps=(4, 8, 16, 32), seeds=3,
            mixture_iterations=8000, mixture_batch=128,
        ),
        "paper": Config(),
    },
    main=main,
)  # fmt: skip
