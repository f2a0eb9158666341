"""Architectures and their input derivatives (Appendix D.3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import nn

from experiments.architectures import figures
from experiments.architectures.derivatives import measure
from experiments.architectures.networks import ARCHITECTURES
from experiments.architectures.precision import method_errors, times
from experiments.architectures.problem import ExactScore
from experiments.architectures.quality import compare, excess, noisy, sample
from experiments.architectures.results import UNTRAINED, results
from experiments.architectures.training import OBJECTIVES, make_field, train
from experiments.common.objectives import FLUX
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from fluxkernels.checks import check_sigma_range


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        seeds: trainings per architecture and objective.
        data: training images.
        iterations, batch, lr, warmup, ema: training with Adam; the learning rate falls to zero along a cosine.
        unet_width: channels of the UNet's first level, a multiple of 8.
        width, blocks, heads: size of the transformers.
        sigma_min, sigma_max: noise levels: log-uniform between them in training, from one to the other in sampling.
        levels: noise levels at which derivatives are measured.
        points: points at which derivatives are measured.
        samples: generated images, and images at which denoising is measured.
        sampling_steps: steps of the reverse VE sampler.
        timed: calls whose median is a time.
    """

    seeds: int = 3
    data: int = 20_000
    iterations: int = 400
    batch: int = 16
    lr: float = 5e-3
    warmup: int = 40
    ema: float = 0.98
    unet_width: int = 8
    width: int = 32
    blocks: int = 2
    heads: int = 4
    sigma_min: float = 0.1
    sigma_max: float = 4.0
    levels: tuple[float, ...] = (0.2, 0.6, 2.0)
    points: int = 6
    samples: int = 300
    sampling_steps: int = 32
    timed: int = 3

    def __post_init__(self) -> None:
        check_sizes(self, data=self.batch, warmup=0, ema=0, samples=2)
        check_sigma_range("architectures", self.sigma_min, self.sigma_max)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if not self.levels:
            raise ValueError("levels must not be empty")


def main(run: Run) -> None:
    """Time every architecture, measure it untrained, train it by both objectives with every seed, compare, draw."""
    measure_exact(run)
    for architecture in ARCHITECTURES:
        if not any(row["architecture"] == architecture for row in run.rows("time")):
            run.log(kind="time", architecture=architecture, **times(run, architecture))
    untrained = product((0,), (UNTRAINED,), ARCHITECTURES)
    models = [*untrained, *product(range(run.config.seeds), OBJECTIVES, ARCHITECTURES)]
    for seed, objective, architecture in run.bar(models, "models"):
        study(run, architecture, objective, seed)
    run.summary(results(run), draw(run))


def measure_exact(run: Run) -> None:
    """Log missing rows "exact": samples of the exact score, and other true images, measured as generated ones are."""
    if run.rows("exact"):
        return
    for seed in range(run.config.seeds):
        generated = sample(run, lambda z, sigma: ExactScore(float(sigma))(z), seed)
        run.log(kind="exact", name="exact score", seed=seed, **compare(run, generated))
        _, true = noisy(run, run.config.samples, run.config.sigma_min, "other", seed)
        run.log(kind="exact", name="true images", seed=seed, **compare(run, true))


def study(run: Run, architecture: str, objective: str, seed: int) -> None:
    """Train one model and log its missing rows: "model", of its samples, and per noise level "derivatives", "method".

    The errors of methods are those of models of Flux Matching.
    """
    key = {"architecture": architecture, "objective": objective, "seed": seed}
    done = {(row["kind"], row.get("sigma")) for row in run.rows() if key.items() <= row.items()}
    levels = run.config.levels
    kinds = ["derivatives", "method"] if objective == FLUX else ["derivatives"]
    wanted = set(product(kinds, levels)) | ({("model", None)} if objective != UNTRAINED else set())
    if done >= wanted:
        return
    field: nn.Module = make_field(run, architecture, seed).requires_grad_(False)
    if objective != UNTRAINED:
        field = train(run, architecture, objective, seed)
    for sigma in levels:
        if ("method", sigma) in wanted - done:
            run.log(kind="method", **key, sigma=sigma, **method_errors(run, field, sigma))
        if ("derivatives", sigma) not in done:
            measured = measure(run, field, sigma, ARCHITECTURES[architecture].token)
            run.log(kind="derivatives", **key, sigma=sigma, excess=excess(run, field, sigma), **measured)
    if ("model", None) in wanted - done:
        count = sum(parameter.numel() for parameter in field.parameters())
        run.log(kind="model", **key, parameters=count, **compare(run, sample(run, field, seed)))


def draw(run: Run) -> list[Figure]:
    """Draw all figures and return them with their captions."""
    captions = {
        "derivatives": "Input derivatives by noise level, Flux Matching.",
        "quality": "Denoising error and distance of samples; one dot per seed.",
        "methods": "Errors of the second-derivative methods; dotted: the difference that another probe makes.",
    }
    figures.draw_derivatives(run.figure("derivatives"), run)
    figures.draw_quality(run.figure("quality"), run)
    figures.draw_methods(run.figure("methods"), run)
    return [Figure(run.figure(name), caption) for name, caption in captions.items()]


EXPERIMENT = Experiment(
    name="architectures",
    title="Input derivatives of a UNet and of patch transformers",
    paper="D.3",
    claim=(
        "Flux Matching needs networks with well-behaved input derivatives. The paper's guess: the patches of a vision "
        "transformer spoil them. The larger the patch, the worse the derivatives, and the more Flux Matching suffers."
    ),
    presets={
        "smoke": Config(
            seeds=1, data=64, iterations=2, batch=8, warmup=0, width=8, blocks=1, heads=2, levels=(0.6,), points=1,
            samples=32, sampling_steps=3, timed=1,
        ),
        "small": Config(),
        "paper": Config(
            data=50_000, iterations=50_000, batch=256, lr=1e-3, warmup=1000, ema=0.999, unet_width=64, width=256,
            blocks=8, heads=8, points=64, samples=4000, sampling_steps=512,
        ),
    },
    main=main,
)  # fmt: skip
