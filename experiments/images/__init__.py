"""Images without any structure imposed (Sec. 4.3, B.3, Table 1): Flux Matching beside score matching."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.common.clock import Clock
from experiments.common.objectives import DSM, FLUX, check_training
from experiments.common.registry import GPU, Experiment, check_sizes
from experiments.common.run import Figure, Result, Run
from experiments.common.timing import log_steps, step_results
from experiments.images import fidelity, figures
from experiments.images.datasets import Images, load, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import likelihood, sample
from experiments.images.stages import SHOWN, best_field, choice, draw, log_floor, reference, train
from experiments.images.training import folder, make_trainer
from fluxmatching.training import PRECISIONS

TRAINED = (FLUX, DSM)
PAPER = {  # Table 1: FID, Inception score, bits a dimension, iterations a second
    "cifar10": {FLUX: (9.06, 8.54, 3.26, 4.01), DSM: (4.74, 8.52, 3.16, 11.63)},
    "celeba64": {FLUX: (7.07, None, 2.17, 1.77), DSM: (2.41, None, 2.03, 7.20)},
}


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment; the defaults are the paper's for CIFAR-10 (Tables 3 and 4).

    Args:
        dataset: "cifar10", "cifar10_subset", "celeba64" or "shapes"; see `datasets.load`.
        iterations, batch, lr, warmup, ema, precision: training by AdamW; the paper's batch is 128 on each of 4 GPUs.
        horizon, tau_max: of Flux Matching: "learned", "uniform" or "exponential" with rate 1, all on [0, tau_max].
        minutes: of one command, of which both objectives get equal shares; 0 for no limit. The same command goes on.
        chunk: images differentiated at once, which bounds the memory.
        flips: whether images are mirrored at random.
        width, multipliers, blocks, dropout: of the UNet.
        attention_level: the level with self-attention, counted from 0, the finest.
        sigma_min, sigma_max: ends of sampling; in training σ is EDM's log-normal.
        sampling_steps: of EDM's Heun sampler; 0 for the probability flow with adaptive Heun, as in the paper.
        tolerance: relative and absolute, of that and of likelihoods.
        evaluations: how often samples are judged during training; the best model counts in the end.
        evaluation_samples, samples: images judged then, and in the end.
        likelihood_images: test images whose likelihood is computed; 0 for none.
        fid: whether FID and Inception score are computed, which needs torch-fidelity.
        inception_weights: file for that; empty downloads it.
        timed_steps: training steps timed on each backend.
    """

    dataset: str = "cifar10"
    iterations: int = 500_000
    batch: int = 512
    lr: float = 1e-4
    warmup: int = 2500
    ema: float = 0.9993
    precision: str = "bf16"
    horizon: str = "learned"
    tau_max: float = 4.0
    minutes: float = 0.0
    chunk: int = 128
    flips: bool = True
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention_level: int = 1
    blocks: int = 2
    dropout: float = 0.1
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sampling_steps: int = 0
    tolerance: float = 1e-5
    evaluations: int = 10
    evaluation_samples: int = 10_000
    samples: int = 50_000
    likelihood_images: int = 10_000
    fid: bool = True
    inception_weights: str = ""
    timed_steps: int = 20

    def __post_init__(self) -> None:
        check_sizes(
            self, attention_level=0, warmup=0, minutes=0, flips=0, dropout=0, ema=0, sampling_steps=0,
            likelihood_images=0, fid=0, evaluation_samples=SHOWN, samples=SHOWN,
        )  # fmt: skip
        if not self.multipliers:
            raise ValueError("multipliers must not be empty")
        if self.attention_level >= len(self.multipliers):
            raise ValueError(f"attention_level must be below {len(self.multipliers)}, got {self.attention_level}")
        check_training("images", self)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def loss_options(self) -> dict[str, Any]:
        """Of `make_loss`, beside the noise."""
        return {"chunk": self.chunk}


def run(run: Run) -> None:
    """Train both fields by turns, judging samples on the way; then sample the best of each and compare."""
    config, clock = run.config, Clock.start(run.config.minutes)
    if config.fid:
        fidelity.check(config.inception_weights)
    images = load(config.dataset)
    log_steps(run, TRAINED, lambda o, b: make_trainer(run, o, images, iterations=10**9, backend=b), config.timed_steps)
    for count in sorted({config.evaluation_samples, config.samples}):
        log_floor(run, images, count)
    train(run, TRAINED, images, clock)
    for objective in TRAINED:
        judge(run, objective, images, clock)
    draw(run, TRAINED)
    grids = {"real": images.train[choice(run, len(images.train), SHOWN)]}
    grids |= {objective: torch.load(shown_file(run, objective), weights_only=True) for objective in TRAINED}
    figures.draw_grids(run.figure("samples"), grids)
    run.summary(
        results(run),
        [
            Figure(run.figure("samples"), "Real images, and samples of both models from the same noise."),
            Figure(run.figure("training"), "Samples from the same noise during the training."),
            Figure(run.figure("distance"), "Fréchet distance on random convolutions during the training."),
        ],
        (f"Data: {images.source}.", "The distance on random convolutions is no FID, and not to be compared with any."),
    )


def judge(run: Run, objective: str, images: Images, clock: Clock) -> None:
    """Samples, distances and likelihood of the best model of an objective (row "final").

    Raises:
        Paused: the time is up.
    """
    config = run.config
    if any(row["objective"] == objective for row in run.rows("final")):
        return
    field, shape = best_field(run, objective, images), tuple(images.train.shape[1:])
    keep = folder(run, objective) / "samples"
    found = sample(run, field, config.samples, shape, f"{objective}: samples", keep=keep, clock=clock)
    torch.save(found[:SHOWN].clone(), shown_file(run, objective))
    real = reference(run, images, len(found))
    row: dict[str, Any] = {"distance": frechet_distance(random_convolutions(to_numbers(found)), real)}
    if config.fid:
        row["fid"], row["inception_score"] = fidelity.fid_and_inception_score(
            found, images.train, config.inception_weights, run.device
        )
    if config.likelihood_images:
        test = images.test[choice(run, len(images.test), config.likelihood_images)]
        row["bits"] = likelihood(run, field, objective, test, clock)
    run.log(kind="final", objective=objective, **row)


def shown_file(run: Run, objective: str) -> Path:
    """Some samples of the best model."""
    return folder(run, objective) / "shown.pt"


def results(run: Run) -> list[Result]:
    """Lines of the summary."""
    lines = [
        Result(
            f"Fréchet distance on random convolutions, {row['samples']} images: real ones / noise with their moments",
            f"{row['distance']:.3f} / {row['noise']:.2f}",
        )
        for row in run.rows("floor")
    ]
    paper = PAPER.get(run.config.dataset, {})
    for row in run.rows("final"):
        objective = row["objective"]
        said = paper.get(objective, (None,) * 4)
        stages = [r["distance"] for r in run.rows("progress") if r["objective"] == objective]
        lines += [
            Result(
                f"{objective}: that distance during training, first / last evaluation",
                f"{stages[0]:.3f} / {stages[-1]:.3f}",
                "criterion: falls",
                stages[-1] < stages[0] if len(stages) > 1 else None,
            ),
            Result(f"{objective}: that distance, best model", f"{row['distance']:.3f}"),
        ]
        for column, name, number in (
            ("fid", "FID", said[0]),
            ("inception_score", "Inception score", said[1]),
            ("bits", "bits a dimension", said[2]),
        ):
            if column in row:
                lines.append(
                    Result(f"{objective}: {name}", f"{row[column]:.3f}", "–" if number is None else f"{number}")
                )
    speeds = {o: f"{1e3 / said[3]:.0f} ms ({paper[DSM][3] / said[3]:.2f} × DSM), batch 32" for o, said in paper.items()}
    return lines + step_results(run, DSM, speeds)


SMOKE = Config(
    dataset="shapes", iterations=4, batch=8, lr=1e-3, warmup=2, ema=0.5, precision="float32", chunk=8, width=8,
    multipliers=(1, 2), blocks=1, dropout=0.0, sampling_steps=3, tolerance=1e-1, evaluations=2,
    evaluation_samples=SHOWN, samples=SHOWN, likelihood_images=12, fid=False, timed_steps=1,
)  # fmt: skip
# Many small minibatches: so early in a training the number of updates decides, for both objectives.
SMALL = Config(
    iterations=4000, batch=16, lr=1e-3, warmup=100, ema=0.995, precision="float32", horizon="exponential", chunk=16,
    width=16, multipliers=(1, 2, 2), attention_level=2, blocks=1, dropout=0.0, sampling_steps=18, tolerance=1e-3,
    evaluations=4, evaluation_samples=500, samples=1000, likelihood_images=32, fid=False, timed_steps=5,
)  # fmt: skip
ON_A_GPU = Config(
    iterations=200_000, batch=128, lr=2e-4, warmup=1000, ema=0.999, minutes=9.0, sampling_steps=18, tolerance=1e-4,
    evaluations=100, evaluation_samples=2000, samples=10_000, likelihood_images=1024, fid=False,
)  # fmt: skip

EXPERIMENT = Experiment(
    name="images",
    title="Images, no structure imposed",
    paper="Sec. 4.3, B.3, Table 1",
    claim=(
        "Flux Matching alone trains a generative model of images. Its samples are somewhat behind those of score "
        "matching, and a step costs more."
    ),
    presets={"smoke": SMOKE, "small": SMALL, GPU: ON_A_GPU, "paper": Config()},
    run=run,
)
