"""Flow matching of images: pairs by optimal transport and rectified flow, by number of evaluations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.registry import GPU, Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.flow_images import figures
from experiments.flow_images.measure import SHOWN, log_distances, log_pairing, log_straightness, shown_file
from experiments.flow_images.results import distances, results
from experiments.flow_images.training import NAMES, train
from experiments.flows.measure import EULER, SOLVERS
from experiments.images.datasets import load
from experiments.images.figures import draw_rows
from experiments.images.stages import floor, log_floor
from fluxmatching.training.options import PRECISIONS


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        dataset: "cifar10", "cifar10_subset", "celeba64" or "shapes"; see `experiments.images.datasets.load`.
        iterations, batch, lr, warmup, ema, precision: training with AdamW; the learning rate falls along a cosine.
        rectified_iterations: iterations on rectified pairs, from the weights of the flow that makes them.
        flips: whether images are mirrored at random.
        width, multipliers, blocks, dropout: size of the UNet.
        attention_level: the level with self-attention, counted from 0, the finest.
        pairs: rectified pairs.
        pair_steps: steps of Heun's method for a pair.
        samples: samples of a flow, compared with as many training images.
        evaluations: numbers of evaluations of the field per sample.
        straight_samples: samples whose trajectories are measured.
        sections: equal steps of time at which they are.
        minibatches: minibatches for the mean squared distance of pairs.
        chunk_size: images per integration, which bounds the memory.
    """

    dataset: str = "cifar10"
    iterations: int = 600
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.99
    precision: str = "32-true"
    rectified_iterations: int = 300
    flips: bool = True
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2, 2)
    attention_level: int = 2
    blocks: int = 1
    dropout: float = 0.0
    pairs: int = 600
    pair_steps: int = 8
    samples: int = 200
    evaluations: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    straight_samples: int = 100
    sections: int = 16
    minibatches: int = 8
    chunk_size: int = 100

    def __post_init__(self) -> None:
        check_sizes(
            self, attention_level=0, warmup=0, flips=0, dropout=0, ema=0, batch=2, samples=SHOWN, pairs=self.batch
        )
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if not self.multipliers or self.attention_level >= len(self.multipliers):
            raise ValueError(f"attention_level must be below {len(self.multipliers)}, got {self.attention_level}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.evaluations[:2] != (1, 2) or list(self.evaluations) != sorted(set(self.evaluations)):
            raise ValueError(f"evaluations must be increasing and begin with 1 and 2, got {self.evaluations}")


def main(run: Run) -> None:
    """Train the flows, measure each, compare, draw."""
    images = load(run.config.dataset)
    log_floor(run, images, run.config.samples)
    log_pairing(run, images)
    for name in run.bar(NAMES, "flows"):
        field = train(run, images, name)
        log_distances(run, images, name, field)
        log_straightness(run, images, name, field)
    notes = (
        f"Data: {images.source}.",
        "The distance on random convolutions is not an FID and not comparable with one.",
        "All flows have the same initial weights, images, start of samples and images to compare with.",
        "rectified: trained on pairs of the flow with independent pairs, from its weights.",
    )
    run.summary(results(run), draw(run), notes)


def draw(run: Run) -> list[Figure]:
    """Draw all figures from the logged rows and the kept samples."""
    distance, samples = run.figure("distance"), run.figure("samples")
    panels = {solver: {name: distances(run, name, solver) for name in NAMES} for solver in SOLVERS}
    figures.draw_distances(distance, panels, floor(run, run.config.samples)["distance"])
    draw_rows(samples, {name: _shown(run, name) for name in NAMES}, "evaluations")
    return [
        Figure(distance, "Fréchet distance on random convolutions by number of evaluations; dashed: held-out images."),
        Figure(samples, "Samples from the same noise by Euler's method."),
    ]


def _shown(run: Run, name: str) -> dict[int, Tensor]:
    """Return some samples by number of evaluations."""
    counts = run.config.evaluations
    return {count: torch.load(shown_file(run, name, EULER, count), weights_only=True) for count in counts}


EXPERIMENT = Experiment(
    name="flow_images",
    title="Couplings and rectified flow of images",
    paper="which it goes beyond: couplings (Tong et al. 2024) and rectified flow (Liu et al. 2023) of images",
    claim=(
        "On images too, trajectories of flows trained on pairs by optimal transport, and of rectified flows, are "
        "straighter than those of flows trained on independent pairs, and samples in one or two evaluations are better."
    ),
    presets={
        "smoke": Config(
            dataset="shapes", iterations=4, batch=8, warmup=2, ema=0.5, rectified_iterations=3, width=8,
            multipliers=(1, 2), attention_level=1, pairs=12, pair_steps=2, samples=SHOWN, evaluations=(1, 2, 4),
            straight_samples=6, sections=3, minibatches=2, chunk_size=3,
        ),
        "small": Config(),
        GPU: Config(
            iterations=6000, batch=128, lr=1e-3, warmup=200, ema=0.999, precision="bf16-mixed",
            rectified_iterations=3000, width=64, multipliers=(1, 2, 2, 2), attention_level=1, blocks=2, dropout=0.1,
            pairs=20_000, pair_steps=16, samples=2000, straight_samples=500, sections=32, chunk_size=1000,
        ),
        "paper": Config(
            iterations=400_000, batch=128, lr=2e-4, warmup=5000, ema=0.9999, precision="bf16-mixed",
            rectified_iterations=200_000, width=128, multipliers=(1, 2, 2, 2), attention_level=1, blocks=2,
            dropout=0.1, pairs=50_000, pair_steps=64, samples=10_000, straight_samples=1000, sections=64,
            minibatches=64, chunk_size=500,
        ),
    },
    main=main,
)  # fmt: skip
