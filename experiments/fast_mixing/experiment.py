"""Fields trained to mix fast (Sec. 4.4, B.4, Fig. 6), on a mixture with exact answers and on images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from experiments.common.clock import Clock
from experiments.common.objectives import OBJECTIVES, MixingTerm
from experiments.common.registry import Experiment
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.common.timing import log_steps
from experiments.fast_mixing import figures, mixture, pictures
from experiments.fast_mixing.example import example
from experiments.fast_mixing.measure import distance_to_data
from experiments.fast_mixing.problem import EXACT, LONGER, SIGMA_MIN, noised
from experiments.fast_mixing.results import distance, results
from experiments.fast_mixing.steps import PAPER, PROCEDURES, PUBLISHED, TUNED
from experiments.images import config as images
from experiments.images import fidelity
from experiments.images.datasets import load
from experiments.images.figures import draw_rows
from experiments.images.sampling import BATCH
from experiments.images.stages import floor
from experiments.images.training import make_trainer


@dataclass(frozen=True)
class Config(images.Config):
    """Sizes of the experiment. All fields of `images` except likelihood_images are used; additional fields:

    Args:
        samples: number of samples per field and number of steps.
        mixing_weight: λ of Eq. 45, for images.
        drift_times_sigma: whether the proxy in the loss steps along σ f, as the published program does, or f (Eq. 43).
        with_training: whether fields of the mixture are trained; without, only the known ones are measured.
        with_images: whether images are studied too; the mixture takes no data and no GPU.
        steps: numbers of predictor-corrector steps for images.
        procedures: how images are sampled, of `steps.PROCEDURES`: as in the paper, as in the published program (the
            denoiser is clamped, one more denoising at the end), with steps tuned for each field.
        tuning_samples: images with which steps are tuned, at most 250.
        thinning: 1 tries all steps of the grids, n every n-th.
        seeds: trainings of each field of the mixture.
        mixture_data, mixture_iterations, mixture_batch, mixture_width: sizes of the trainings on the mixture.
        mixture_mixing_weights: values of λ for the mixture, one trained field for each.
        mixture_steps, mixture_samples: numbers of predictor-corrector steps for the mixture, and of samples
            of trained fields.
        exact_samples: samples of the fields that are not trained.
        tuned_steps: numbers of steps for which steps are tuned on the mixture.
        proxy_sigmas: noise levels at which the proxies are measured, beside mixture_sigma.
        minibatches: minibatches of 256 over which the proxies are averaged.
        mixture_sigma: noise level of the Langevin chains.
        chains, chain_steps, langevin_step_size: chains for the autocorrelation time; the step size in units of σ².
    """

    samples: int = 1000
    mixing_weight: float = 0.01
    drift_times_sigma: bool = True
    with_training: bool = True
    with_images: bool = True
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    procedures: tuple[str, ...] = PROCEDURES
    tuning_samples: int = 250
    thinning: int = 1
    seeds: int = 5
    mixture_data: int = 10_000
    mixture_iterations: int = 20_000
    mixture_batch: int = 256
    mixture_width: int = 128
    mixture_mixing_weights: tuple[float, ...] = (0.01, 3.0)
    mixture_steps: tuple[int, ...] = (3, 5, 10, 20, 40)
    mixture_samples: int = 10_000
    exact_samples: int = 40_000
    tuned_steps: tuple[int, ...] = (3, 5)
    proxy_sigmas: tuple[float, ...] = (0.3, 2.0)
    minibatches: int = 20
    mixture_sigma: float = 0.7
    chains: int = 500
    chain_steps: int = 8000
    langevin_step_size: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.steps and self.mixture_steps and self.tuned_steps and self.procedures):
            raise ValueError("steps, mixture_steps, tuned_steps and procedures must not be empty")
        if not set(self.procedures) <= set(PROCEDURES):
            raise ValueError(f"procedures must be of {', '.join(PROCEDURES)}, got {', '.join(self.procedures)}")
        if not set(self.tuned_steps) <= set(self.mixture_steps):
            raise ValueError(f"tuned_steps must be in mixture_steps {self.mixture_steps}, got {self.tuned_steps}")
        if self.tuning_samples > BATCH:
            raise ValueError(f"tuning_samples must be at most {BATCH}, got {self.tuning_samples}")
        for name in ("batch", "mixture_batch"):
            if getattr(self, name) < 4:  # the proxy compares two halves of a minibatch
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}")
        if self.mixture_data < self.mixture_batch:
            raise ValueError(f"mixture_data must be at least mixture_batch, got {self.mixture_data}")

    def loss_options(self) -> dict[str, Any]:
        return {**super().loss_options(), "mixing": MixingTerm(self.mixing_weight, self.drift_times_sigma)}


def main(run: Run) -> None:
    """Study the mixture, then images, and draw the figures."""
    config, clock = run.config, Clock.start(run.config.minutes)
    if config.with_images and config.fid:
        fidelity.check(config.inception_weights)
    mixture.study(run, clock)
    for seed in range(len(run.rows("mixture floor")), config.seeds):
        exact = noised(SIGMA_MIN).sample(config.exact_samples, run.generator("floor", seed))
        run.log(kind="mixture floor", seed=seed, distance=distance_to_data(exact, SIGMA_MIN))
    notes = ["The distance of samples of the mixture is the sliced W2 to exact samples."]
    if config.with_images:
        data = load(config.dataset)
        log_steps(
            run, OBJECTIVES, lambda o, b: make_trainer(run, o, data, iterations=10**9, backend=b), config.timed_steps
        )
        pictures.study(run, data, clock)
        notes += [
            f"Data: {data.source}.",
            "The distance on random convolutions is not an FID, nor comparable with one.",
        ]
    run.summary(results(run), draw(run), notes)


def draw(run: Run) -> list[Figure]:
    """Draw all figures from the logged rows."""
    config, names = run.config, mixture.fields(run.config)
    shown = {
        name: {k: run.by_seed("steps", "distance", field=name, steps=k, procedure=PAPER) for k in config.mixture_steps}
        for name in (*mixture.trained(config), EXACT, LONGER)
    }
    exact = mean(run.by_seed("mixture floor", "distance"))
    figures.draw_curves(run.figure("mixture"), shown, exact, "exact samples", "sliced W2 to exact samples")
    few = {
        f"{procedure}, {k} steps": {
            name: run.by_seed("steps", "distance", field=name, steps=k, procedure=procedure) for name in names
        }
        for k in config.tuned_steps
        for procedure in (PAPER, TUNED)
    }
    figures.draw_few_steps(run.figure("few_steps"), few, exact)
    level = {"sigma": config.mixture_sigma}
    panels = {
        "autocorrelation time (σ²)": {name: run.by_seed("mixture", "time", field=name) for name in names},
        "W2 of the chain's end to p_σ": {name: run.by_seed("mixture", "bias", field=name) for name in names},
        "proxy, Eq. 44": {name: run.by_seed("proxy", "ours", field=name, **level) for name in names},
        "proxy, published": {name: run.by_seed("proxy", "published", field=name, **level) for name in names},
    }
    figures.draw_bars(run.figure("mixing"), panels)
    drawn = [
        Figure(run.figure("few_steps"), "Mixture: distance in few steps, with the paper's and with tuned steps."),
        Figure(run.figure("mixture"), "Mixture: distance by number of steps of Algorithm 3."),
        Figure(run.figure("mixing"), "Mixture: autocorrelation time and bias of Langevin chains, and both proxies."),
    ]
    return drawn + (draw_images(run) if config.with_images else [])


def draw_images(run: Run) -> list[Figure]:
    """Draw the figures of images."""
    config, procedure = run.config, run.config.procedures[0]
    curves = {name: {k: [distance(run, name, k, procedure)] for k in config.steps} for name in OBJECTIVES}
    real = floor(run, config.samples)["distance"]
    figures.draw_curves(run.figure("steps"), curves, real, "real images", "Fréchet distance, random convolutions")
    shown = {
        name: {k: torch.load(pictures.shown_file(run, name, k, procedure), weights_only=True) for k in config.steps}
        for name in OBJECTIVES
    }
    draw_rows(run.figure("pictures"), shown, "steps")
    return [
        Figure(run.figure("steps"), f"Images, {procedure}: Fréchet distance on random convolutions (Fig. 6)."),
        Figure(run.figure("pictures"), f"Images from the same noise in few steps, {procedure}."),
    ]


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
            mixture_batch=32, mixture_width=8, mixture_mixing_weights=(3.0,), mixture_steps=(2, 4),
            mixture_samples=50, exact_samples=50, tuned_steps=(2,), proxy_sigmas=(1.5,), chains=50, chain_steps=1000,
            mixture_sigma=1.5, thinning=100, minibatches=2, tuning_samples=images.SHOWN,
        ),
        "small": _like(
            images.SMALL, iterations=2000, evaluations=1, samples=500, steps=(4, 8, 16, 32), seeds=3,
            procedures=(PAPER, PUBLISHED), mixture_iterations=1000, mixture_batch=128,
            mixture_steps=(3, 5, 10, 20), thinning=3,
        ),
        "paper": Config(),
    },
    main=main,
    example=example,
)  # fmt: skip
