"""Fields at one noise level, by Flux Matching and score matching, with and without a penalty at the boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.common.networks import Perceptron
from experiments.common.objectives import averaged_field
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from experiments.constrained.domains import PROBLEMS, Domain, Problem
from fluxmatching import DenoisingScoreMatching, EDMField, FluxMatching, FluxOptions, Trainer, TrainingOptions

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """Loss that trains a field.

    Attributes:
        flux: Flux Matching; else denoising score matching.
        penalty: with the penalty at the boundary.
        turning: starts with a rotation.
    """

    flux: bool
    penalty: bool = False
    turning: bool = False


SCORE, SCORE_PENALTY = "score", "score, penalty"
FLUX, FLUX_PENALTY = "flux", "flux, penalty"
TURNING, TURNING_PENALTY = "turning flux", "turning flux, penalty"
VARIANTS = {
    SCORE: Variant(flux=False),
    SCORE_PENALTY: Variant(flux=False, penalty=True),
    FLUX: Variant(flux=True),
    FLUX_PENALTY: Variant(flux=True, penalty=True),
    TURNING: Variant(flux=True, turning=True),
    TURNING_PENALTY: Variant(flux=True, penalty=True, turning=True),
}


class TurningField(nn.Module):
    """f(z) = g(z) + ω Jz at one noise level: a preconditioned network beside a rotation of pairs of coordinates.

    Args:
        dim, width: number of dimensions and width of the hidden layers.
        sigma: noise level.
        spread: standard deviation of the data.
        turn: ω of the start in units of 1/spread². The network can learn to undo it.

    Shape:
        z `[n, D]`; returns the shape of z.
    """

    def __init__(self, dim: int, width: int, sigma: float, spread: float, turn: float = 0.0) -> None:
        super().__init__()
        self.network, self.sigma = EDMField(Perceptron(dim, width), spread), sigma
        self.omega = turn / spread**2

    def forward(self, z: Tensor) -> Tensor:
        f = self.network(z, self.sigma)
        if not self.omega:
            return f
        first, second = z.unflatten(-1, (-1, 2)).unbind(-1)
        return f + self.omega * torch.stack([-second, first], -1).flatten(-2)


def boundary_penalty(f: Tensor, normal: Tensor, sigma: float, margin: float) -> Tensor:
    """Average σ² relu(margin/σ - f·n)² over points of the boundary.

    Args:
        f: field at the points, `[n, D]`.
        normal: inward unit normals n, `[n, D]`.
        sigma: σ, which makes the result a number without unit.
        margin: inward component of σ f from which on nothing is paid. 0 punishes outward components alone.

    Returns:
        `[]`.
    """
    return (margin - sigma * (f * normal).sum(-1)).relu().square().mean()


class BoundaryMatching(nn.Module):
    """A loss in units of the squared error of σ f, plus λ times the penalty at the boundary.

    Flux Matching has the gradient of J̃/σ², so σ⁴ ℓ has that of σ² J̃; score matching in its ε-form has that of
    σ² E|f - s|². The penalty is taken at the points of the boundary nearest to the minibatch.

    Args:
        loss: `FluxMatching` or `DenoisingScoreMatching` at a fixed noise level, whose field is penalized.
        domain: the domain.
        sigma: σ.
        weight: λ ≥ 0.
        margin: see `boundary_penalty`.
    """

    def __init__(self, loss: nn.Module, domain: Domain, sigma: float, weight: float, margin: float) -> None:
        super().__init__()
        self.loss, self.field = loss, loss.get_submodule("field")
        self.domain, self.sigma, self.weight, self.margin = domain, sigma, weight, margin
        self.scale = sigma**4 if isinstance(loss, FluxMatching) else 1.0

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss `[]` and what is logged: "loss", "matching" and "penalty"."""
        matching = self.scale * self.loss(x, seed=seed)[0]
        y, normal = self.domain.nearest_boundary(x)
        penalty = boundary_penalty(self.field(y), normal, self.sigma, self.margin)
        loss = matching + self.weight * penalty
        return loss, {"loss": loss.detach(), "matching": matching.detach(), "penalty": penalty.detach()}


def data(run: Run, name: str) -> Tensor:
    """Draw the training samples of a problem, `[data, D]`."""
    return PROBLEMS[name].draw(run.config.data, run.generator("data", name)).float().to(run.device)


def make_loss(run: Run, problem: Problem, variant: Variant, spread: float, seed: int) -> BoundaryMatching:
    """Make the loss module of a variant; fields of one problem and seed start with the same weights."""
    config, sigma, dim = run.config, problem.sigma, problem.domain.dim
    with run.drawing("weights", seed):
        turn = config.turn if variant.turning else 0.0
        field = TurningField(dim, config.width, sigma, spread, turn)
    loss: nn.Module
    if variant.flux:
        loss = FluxMatching(field, sigma, FluxOptions(strata=4, backend=run.backend))
    else:
        loss = DenoisingScoreMatching(field, sigma)
    return BoundaryMatching(
        loss, problem.domain, sigma, config.weight if variant.penalty else 0.0, config.margin
    )  # fmt: skip


def train(run: Run, problem: str, variant: str, seed: int) -> nn.Module:
    """Train, or resume training, and return the averaged field.

    Args:
        run: settings, random numbers, backend, device and folder.
        problem: one of `PROBLEMS`.
        variant: one of `VARIANTS`.
        seed: determines initial weights, minibatches and noise.
    """
    config, x = run.config, data(run, problem)
    options = TrainingOptions(
        config.steps, config.batch, lr=config.lr, optimizer="adam", ema=config.ema,
        seed=run.generator("training", seed).initial_seed() >> 1, accelerator=str(run.device), progress=False,
    )  # fmt: skip
    trainer = Trainer(
        make_loss(run, PROBLEMS[problem], VARIANTS[variant], x.std().item(), seed),
        x,
        options,
        folder=run.out / "models" / f"{problem}-{variant}-{seed}".replace(", ", "-").replace(" ", "-"),
        lr_factor=cosine_decay(config.steps),
    )
    trainer.run()
    run.save_seconds()
    return averaged_field(trainer).requires_grad_(False)
