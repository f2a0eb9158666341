"""Images without any structure imposed (Sec. 4.3, B.3, Table 1): Flux Matching beside score matching."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.common.objectives import DSM, FLUX
from experiments.common.registry import GPU, Experiment, Paused, check_sizes
from experiments.common.run import Figure, Result, Run
from experiments.common.timing import log_steps, step_results
from experiments.images import fidelity, figures
from experiments.images.datasets import Images, load, to_numbers
from experiments.images.frechet import frechet_distance, random_convolutions
from experiments.images.sampling import likelihoods, sample
from experiments.images.training import averaged_field, folder, make_trainer

TRAINED = (FLUX, DSM)
SHOWN = 64
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
        rate, tau_max: of the truncated exponential horizon; rate 0 learns it.
        minutes: of training in one command, shared by both objectives; 0 for no limit. The same command goes on.
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
    rate: float = 0.0
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
            self, attention_level=0, warmup=0, rate=0, minutes=0, flips=0, dropout=0, ema=0, sampling_steps=0,
            likelihood_images=0, fid=0, evaluation_samples=SHOWN, samples=SHOWN,
        )  # fmt: skip
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive, got {self.multipliers}")
        if self.attention_level >= len(self.multipliers):
            raise ValueError(f"attention_level must be below {len(self.multipliers)}, got {self.attention_level}")
        if self.evaluations > self.iterations:
            raise ValueError(f"evaluations must be at most iterations, got {self.evaluations} and {self.iterations}")


def run(run: Run) -> None:
    """Train both fields by turns, judging samples on the way; then sample the best of each and compare."""
    config = run.config
    if config.fid:
        fidelity.check(config.inception_weights)
    images = load(config.dataset)
    real = random_convolutions(to_numbers(images.train[_choice(run, len(images.train), config.samples)]))
    log_steps(run, TRAINED, lambda o, b: make_trainer(run, o, images, iterations=10**9, backend=b), config.timed_steps)
    log_floor(run, images, real)
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    for stage in range(1, config.evaluations + 1):
        for objective in TRAINED:
            train(run, objective, images, real, stage, deadline)
        draw_progress(run)
    for objective in TRAINED:
        judge(run, objective, images, real)
    draw_progress(run)
    grids = {"real": images.train[_choice(run, len(images.train), SHOWN)]}
    grids |= {objective: torch.load(_shown(run, objective), weights_only=True) for objective in TRAINED}
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


def train(run: Run, objective: str, images: Images, real: Tensor, stage: int, deadline: float) -> None:
    """Train a field up to a stage and judge samples of its moving average there; keep it if it is the best so far.

    Raises:
        Paused: the time is up.
    """
    config = run.config
    target = config.iterations * stage // config.evaluations
    if any(row["objective"] == objective and row["iteration"] >= target for row in run.rows("progress")):
        return
    trainer = make_trainer(run, objective, images, iterations=target, folder=folder(run, objective))
    # The other objective has the same share of the time.
    turns = len(TRAINED) - TRAINED.index(objective)
    trainer.run(seconds=max(0.0, deadline - time.monotonic()) / turns if trainer.iteration < target else 0.0)
    if trainer.iteration < target:
        if objective != TRAINED[-1]:
            return
        raise Paused(f"training is at iteration {trainer.iteration} of {config.iterations}")
    field = averaged_field(trainer)
    name = f"{objective}: samples at {target}"
    found = sample(run, field, config.evaluation_samples, tuple(images.train.shape[1:]), name, None)
    distance = frechet_distance(random_convolutions(to_numbers(found)), real)
    fid = fidelity.fid_and_inception_score(found, images.train, config.inception_weights)[0] if config.fid else None
    judged = distance if fid is None else fid
    best = min((row["judged"] for row in run.rows("progress") if row["objective"] == objective), default=math.inf)
    if judged < best:
        torch.save(field.state_dict(), folder(run, objective) / "best.pt")
    torch.save(found[:SHOWN].clone(), folder(run, objective) / f"shown-{stage}.pt")
    run.log(
        kind="progress", objective=objective, stage=stage, iteration=target, distance=distance, fid=fid, judged=judged
    )


def judge(run: Run, objective: str, images: Images, real: Tensor) -> None:
    """Samples, distances and likelihood of the best model of an objective."""
    config = run.config
    if any(row["objective"] == objective for row in run.rows("final")):
        return
    trainer = make_trainer(run, objective, images, iterations=1)
    field = averaged_field(trainer)
    field.load_state_dict(torch.load(folder(run, objective) / "best.pt", map_location=run.device, weights_only=True))
    shape = tuple(images.train.shape[1:])
    found = sample(run, field, config.samples, shape, f"{objective}: samples", folder(run, objective) / "samples")
    torch.save(found[:SHOWN].clone(), _shown(run, objective))
    row: dict[str, Any] = {"distance": frechet_distance(random_convolutions(to_numbers(found)), real)}
    if config.fid:
        row["fid"], row["inception_score"] = fidelity.fid_and_inception_score(
            found, images.train, config.inception_weights
        )
    if config.likelihood_images:
        bits = likelihoods(run, field, objective, images, config.likelihood_images)
        row["bits"] = sum(bits) / len(bits)
    run.log(kind="final", objective=objective, **row)


def log_floor(run: Run, images: Images, real: Tensor) -> None:
    """The distance of held-out real images, what a perfect model would have, and that of noise with their moments."""
    if run.rows("floor"):
        return
    held_out = to_numbers(images.test[_choice(run, len(images.test), run.config.samples)])
    noise = torch.randn(held_out.shape, generator=run.generator("moments"))
    independent = held_out.mean(0) + held_out.std(0) * noise
    distances = [frechet_distance(random_convolutions(x), real) for x in (held_out, independent)]
    run.log(kind="floor", distance=distances[0], noise=distances[1])


def draw_progress(run: Run) -> None:
    """The figures that grow with the training."""
    rows = run.rows("progress")
    curves = {o: [(row["iteration"], row["distance"]) for row in rows if row["objective"] == o] for o in TRAINED}
    stages = {
        o: [
            (row["iteration"], torch.load(folder(run, o) / f"shown-{row['stage']}.pt", weights_only=True)[:8])
            for row in rows
            if row["objective"] == o
        ]
        for o in TRAINED
    }
    if all(curves.values()):
        figures.draw_distance(run.figure("distance"), curves, run.rows("floor")[0]["distance"])
        figures.draw_progress(run.figure("training"), stages)


def results(run: Run) -> list[Result]:
    """Lines of the summary."""
    floor = run.rows("floor")[0]
    lines = [
        Result(
            "Fréchet distance on random convolutions: real images / noise with their moments",
            f"{floor['distance']:.4f} / {floor['noise']:.2f}",
        )
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


def _choice(run: Run, total: int, count: int) -> Tensor:
    """Which images stand for a data set: the same in every part of a run."""
    return torch.randperm(total, generator=run.generator("choice", total))[:count]


def _shown(run: Run, objective: str) -> Any:
    return folder(run, objective) / "shown.pt"


SMOKE = Config(
    dataset="shapes", iterations=4, batch=8, lr=1e-3, warmup=2, ema=0.5, precision="float32", chunk=8, width=8,
    multipliers=(1, 2), blocks=1, dropout=0.0, sampling_steps=3, tolerance=1e-1, evaluations=2,
    evaluation_samples=SHOWN, samples=SHOWN, likelihood_images=8, fid=False, timed_steps=1,
)  # fmt: skip
# Many small minibatches: so early in a training the number of updates decides, for both objectives.
SMALL = Config(
    iterations=4000, batch=16, lr=1e-3, warmup=100, ema=0.995, precision="float32", rate=1.0, chunk=16, width=16,
    multipliers=(1, 2, 2), attention_level=2, blocks=1, dropout=0.0, sampling_steps=18, tolerance=1e-3, evaluations=4,
    evaluation_samples=500, samples=1000, likelihood_images=32, fid=False, timed_steps=5,
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
