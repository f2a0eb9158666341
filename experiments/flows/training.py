"""Training of the flows: one network, and variants of path, pairs and target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.objectives import averaged_field
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from experiments.flows.problems import Problem, draw
from fluxmatching import (
    CosinePath,
    ExactCoupling,
    FlowMatching,
    FlowOptions,
    LinearPath,
    SinkhornCoupling,
    Trainer,
    TrainingOptions,
    UniformTimes,
    VariancePreservingPath,
    rectified_pairs,
)
from fluxmatching.flows.couplings import Coupling
from fluxmatching.flows.paths import Path as FlowPath
from fluxmatching.networks import Perceptron


@dataclass(frozen=True)
class Variant:
    """One way to train a flow.

    Attributes:
        name: name in tables and of files.
        path: path from x0 to x1.
        coupling: pairs x0 with x1; None leaves them independent.
        needs_noise: whether it is for a normal source only.
        stable_target: whether it regresses on the posterior mean over all data.
        rectified: whether it is trained on the pairs of the flow `INDEPENDENT`.
        end: last time of training and sampling.
    """

    name: str
    path: FlowPath
    coupling: Coupling | None = None
    needs_noise: bool = False
    stable_target: bool = False
    rectified: bool = False
    end: float = 1.0


INDEPENDENT, EXACT, RECTIFIED = "independent", "exact OT", "rectified"
VARIANTS = (
    Variant(INDEPENDENT, LinearPath()),
    Variant("cosine path", CosinePath()),
    # σ' is infinite at t = 1; where sampling ends σ is 0.01.
    Variant("variance preserving", VariancePreservingPath(), needs_noise=True, end=0.999),
    Variant(EXACT, LinearPath(), ExactCoupling()),
    Variant("Sinkhorn", LinearPath(), SinkhornCoupling(regularization=0.2, tolerance=0.05)),
    Variant("stable target", LinearPath(), needs_noise=True, stable_target=True),
    Variant(RECTIFIED, LinearPath(), rectified=True),
)


def variants(problem: Problem) -> list[Variant]:
    """Return the variants that exist for a problem, `INDEPENDENT` first."""
    return [variant for variant in VARIANTS if problem.from_noise or not variant.needs_noise]


class Velocity(nn.Module):
    """v(x, t), a perceptron of x and t.

    Args:
        width: width of its three hidden layers.

    Shape:
        x `[n, 2]`, t `[n]` or `[]`; returns the shape of x.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = Perceptron(2, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t.expand(len(x)))


def training_data(run: Run, problem: Problem, seed: int) -> Tensor:
    """Draw the training samples of the data, `[data, 2]`, the same for all variants."""
    return draw(run, problem.target, run.config.data, "data", problem.name, seed)


def make_pairs(run: Run, problem: Problem, seed: int) -> Tensor:
    """Pair samples of the source with the ends of the trained flow `INDEPENDENT`, `[data, 2, 2]`."""
    field = train(run, problem, variants(problem)[0], seed)
    start = draw(run, problem.source, run.config.data, "start of pairs", problem.name, seed)
    return torch.stack(rectified_pairs(field, start), 1)


def make_loss(run: Run, problem: Problem, variant: Variant, seed: int) -> FlowMatching:
    """Make the loss module of a variant; all variants start with the same weights."""
    config = run.config
    with run.drawing("weights", problem.name, seed):
        field = Velocity(config.width)
    source = None
    if not (problem.from_noise or variant.rectified):
        source = draw(run, problem.source, config.data, "source", problem.name, seed)
    options = FlowOptions(
        path=variant.path,
        times=UniformTimes(end=variant.end),
        stable_target=variant.stable_target,
        backend=run.backend,
    )
    return FlowMatching(
        field,
        options,
        source=source,
        coupling=variant.coupling,
        paired=variant.rectified,
        refs=training_data(run, problem, seed) if variant.stable_target else None,
    )


def make_trainer(run: Run, problem: Problem, variant: Variant, seed: int) -> Trainer:
    """Make a trainer, which resumes from the last checkpoint in the folder of the variant and seed."""
    config = run.config
    options = TrainingOptions(
        config.iterations,
        config.batch,
        lr=config.lr,
        optimizer="adam",
        ema=config.ema,
        clip=None,
        seed=run.generator("training", problem.name, seed).initial_seed() >> 1,
        accelerator=str(run.device),
        progress=False,
    )
    return Trainer(
        make_loss(run, problem, variant, seed),
        make_pairs(run, problem, seed) if variant.rectified else training_data(run, problem, seed),
        options,
        folder=model_folder(run, problem, variant, seed),
        lr_factor=cosine_decay(config.iterations),
    )


def train(run: Run, problem: Problem, variant: Variant, seed: int) -> nn.Module:
    """Train, or resume training, and return the averaged field."""
    trainer = make_trainer(run, problem, variant, seed)
    trainer.run()
    return averaged_field(trainer)


def model_folder(run: Run, problem: Problem, variant: Variant, seed: int) -> Path:
    """Return the folder of a training."""
    return run.out / "models" / f"{problem.name}-{variant.name.replace(' ', '-')}-{seed}"
