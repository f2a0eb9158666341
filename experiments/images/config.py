"""Settings of the experiment and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.common.objectives import check_training
from experiments.common.registry import check_sizes
from fluxmatching.training.options import PRECISIONS

SHOWN = 64  # samples that a run keeps for its figures


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment; the defaults are the paper's for CIFAR-10 (Tables 3 and 4).

    Args:
        dataset: "cifar10", "cifar10_subset", "celeba64" or "shapes"; see `datasets.load`.
        iterations, batch, lr, warmup, ema, precision: training with AdamW; the paper's batch is 128 on each of 4 GPUs.
        horizon, tau_max: horizon of Flux Matching: "learned", "uniform" or "exponential" with rate 1, all on
            [0, tau_max].
        minutes: time limit of one command, shared equally by both objectives; 0 for no limit. The same command resumes.
        chunk_size: images differentiated at once, which bounds the memory.
        flips: whether images are mirrored at random.
        width, multipliers, blocks, dropout: size of the UNet.
        attention_level: the level with self-attention, counted from 0, the finest.
        sigma_min, sigma_max: ends of sampling; in training σ is EDM's log-normal.
        sampling_steps: steps of EDM's Heun sampler; 0 for the probability flow with adaptive Heun, as in the paper.
        tolerance: relative and absolute tolerance of the probability flow and of likelihoods.
        evaluations: how often samples are evaluated during training; the best model counts at the end.
        evaluation_samples, samples: number of images at each evaluation, and at the end.
        likelihood_images: test images whose likelihood is computed; 0 for none.
        fid: whether to compute FID and Inception score, which needs torch-fidelity.
        inception_weights: weights file of the Inception network; empty downloads it.
        timed_steps: training steps timed on each backend.
    """

    dataset: str = "cifar10"
    iterations: int = 500_000
    batch: int = 512
    lr: float = 1e-4
    warmup: int = 2500
    ema: float = 0.9993
    precision: str = "bf16-mixed"
    horizon: str = "learned"
    tau_max: float = 4.0
    minutes: float = 0.0
    chunk_size: int = 128
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
        """Options of `make_loss` that the preset sets."""
        return {"chunk_size": self.chunk_size}


SMOKE = Config(
    dataset="shapes", iterations=4, batch=8, lr=1e-3, warmup=2, ema=0.5, precision="32-true", chunk_size=8, width=8,
    multipliers=(1, 2), blocks=1, dropout=0.0, sampling_steps=3, tolerance=1e-1, evaluations=2,
    evaluation_samples=SHOWN, samples=SHOWN, likelihood_images=12, fid=False, timed_steps=1,
)  # fmt: skip
# Many small minibatches: this early in training the number of updates decides, for both objectives.
SMALL = Config(
    iterations=4000, batch=16, lr=1e-3, warmup=100, ema=0.995, precision="32-true", horizon="exponential",
    chunk_size=16, width=16, multipliers=(1, 2, 2), attention_level=2, blocks=1, dropout=0.0, sampling_steps=18,
    tolerance=1e-3, evaluations=4, evaluation_samples=500, samples=1000, likelihood_images=32, fid=False, timed_steps=5,
)  # fmt: skip
ON_A_GPU = Config(
    iterations=200_000, batch=128, lr=2e-4, warmup=1000, ema=0.999, minutes=9.0, sampling_steps=18, tolerance=1e-4,
    evaluations=100, evaluation_samples=2000, samples=10_000, likelihood_images=1024, fid=False,
)  # fmt: skip
