"""Settings of the experiment and its presets."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.objectives import check_training
from experiments.common.registry import check_sizes
from experiments.springs.simulator import LENGTH

SAMPLERS = ("reverse", "ode")
LABELS = ("sigma", "sigma2")


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment; the defaults are the paper's (Table 6).

    Args:
        seeds: trainings per model.
        data: number of training trajectories.
        every: keep every n-th of their 50 time points, starting with the first.
        standardize: whether models are trained on data with mean 0 and deviation 1 of each of the four coordinates,
            as in the published program; distances of samples are in the simulator's units either way, those of linear
            fields in the units of the models.
        refs: reference points of both objectives, the first of the training trajectories; 0 takes the minibatch.
        iterations, batch, lr, warmup, ema: training with Adam.
        minutes: time limit of one command; 0 for no limit. The same command resumes.
        evaluations: number of evaluations per model, spread evenly over the training.
        horizon, tau_max: horizon of Flux Matching: "learned", "uniform" or "exponential" with rate 1, all on
            [0, tau_max].
        sigma_min, sigma_max: noise levels: log-uniform between them in training, from one to the other in sampling.
        dsm_label: noise label of the score-matching networks in training: "sigma"; or "sigma2", σ² in place of σ, a
            fault of the published program, whose sampler labels by σ. Flux Matching has σ in both.
        input_scaling: whether the field has EDM's preconditioning; False is F(z)/σ, as in the published program.
        width, blocks, heads: size of the transformer.
        samples: number of generated trajectories.
        sampler: "reverse", the reverse VE sampler; or "ode", Euler's method for the probability flow, as in the
            published program.
        sampling_steps: number of steps of the sampler.
        line_refs, line_batches: reference points beside the minibatch, and minibatches, of the line test.
        timed_steps: training steps timed on each backend.
    """

    seeds: int = 3
    data: int = 2000
    every: int = 1
    standardize: bool = False
    refs: int = 0
    iterations: int = 10_000
    batch: int = 256
    lr: float = 3e-4
    warmup: int = 0
    ema: float = 0.99
    minutes: float = 0.0
    evaluations: int = 5
    horizon: str = "learned"
    tau_max: float = 4.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    dsm_label: str = "sigma"
    input_scaling: bool = True
    width: int = 512
    blocks: int = 12
    heads: int = 8
    samples: int = 2000
    sampler: str = "reverse"
    sampling_steps: int = 512
    line_refs: int = 2000
    line_batches: int = 16
    timed_steps: int = 20

    def __post_init__(self) -> None:
        check_sizes(
            self, data=self.batch, standardize=0, refs=0, warmup=0, ema=0, minutes=0, input_scaling=0, line_batches=2
        )
        check_training("springs", self)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if self.every > LENGTH // 2:
            raise ValueError(f"every must leave two points of {LENGTH}, so be at most {LENGTH // 2}, got {self.every}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 heads, got {self.width} and {self.heads}")
        if self.refs and not self.batch <= self.refs <= self.data:
            raise ValueError(
                f"refs must be 0 (the minibatch) or from batch = {self.batch} to data = {self.data}, got {self.refs}"
            )
        for name, choices in (("sampler", SAMPLERS), ("dsm_label", LABELS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


SMOKE = Config(
    seeds=1, data=64, iterations=4, batch=16, evaluations=2, width=16, blocks=1, heads=2, samples=32, sampling_steps=8,
    line_refs=64, line_batches=2, timed_steps=1,
)  # fmt: skip
# The moving average of "small" spans about as many trajectories as the paper's: 1000 minibatches of 16 against 100 of
# 256. Without a warm-up one of the first two seeds stays at its start (full attention, Flux Matching: W2 is 56 after
# 5000 iterations).
SMALL = Config(
    iterations=5000, batch=16, lr=1e-3, warmup=200, ema=0.999, horizon="exponential", width=64, blocks=3, heads=4,
    samples=500, sampling_steps=128,
)  # fmt: skip
# The published program's procedure with a smaller network, in pieces of nine minutes.
ON_A_GPU = Config(
    standardize=True, minutes=9.0, evaluations=10, dsm_label="sigma2", input_scaling=False, width=256, blocks=4,
    sampler="ode",
)  # fmt: skip
