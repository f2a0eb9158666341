"""Fields at one noise level, by Flux Matching and score matching, with and without a penalty at the boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from experiments.common.networks import FixedLevelField
from experiments.common.objectives import averaged_field
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from experiments.constrained.domains import PROBLEMS, Domain, Problem
from experiments.constrained.smoothed_box import SmoothedBox
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    FluxMatching,
    FluxOptions,
    Trainer,
    TrainingOptions,
)

Field = Callable[[Tensor], Tensor]
STRATA = 8  # horizons per minibatch of Flux Matching


@dataclass(frozen=True)
class Variant:
    """Loss that trains a field.

    Attributes:
        flux: Flux Matching; else denoising score matching.
        penalty: "inward" or "gentle", by the margin of the penalty at the boundary; "" without it.
        outward: with the circulation of `smoothed_box` added, which crosses the boundary; for the box of the plane.
    """

    flux: bool
    penalty: str = ""
    outward: bool = False


SCORE, SCORE_PENALTY = "score", "score, penalty"
FLUX, FLUX_PENALTY = "flux", "flux, penalty"
START, START_PENALTY = "outward start", "outward start, gentle penalty"
VARIANTS = {
    SCORE: Variant(flux=False),
    SCORE_PENALTY: Variant(flux=False, penalty="inward"),
    FLUX: Variant(flux=True),
    FLUX_PENALTY: Variant(flux=True, penalty="inward"),
    START: Variant(flux=True, outward=True),
    START_PENALTY: Variant(flux=True, outward=True, penalty="gentle"),
}


def variants(problem: str) -> list[str]:
    """Return the names of the variants that are trained on a problem."""
    return [name for name, variant in VARIANTS.items() if problem == "box" or not variant.outward]


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


def make_field(run: Run, problem: Problem, variant: Variant, spread: float, seed: int) -> FixedLevelField:
    """Make a field with the untrained network of a seed."""
    with run.drawing("weights", seed):
        added = SmoothedBox(problem.sigma).circulation if variant.outward else None
        return FixedLevelField(problem.domain.dim, run.config.width, problem.sigma, spread, added).to(run.device)


def make_loss(run: Run, problem: Problem, variant: Variant, field: FixedLevelField, x: Tensor) -> BoundaryMatching:
    """Make the loss module of a variant.

    In the plane the reference points are a fixed set. In many dimensions they are the minibatch: a fixed set would not
    contain the points of the minibatch, and its estimate would pull each of them to some other point far away.

    Args:
        run: settings and backend.
        problem: domain and noise level.
        variant: the loss.
        field: field to train.
        x: training samples, `[n, D]`, from which the fixed set is taken.
    """
    config, sigma = run.config, problem.sigma
    refs = x[: config.refs] if problem.domain.dim == 2 else None
    loss: nn.Module
    if variant.flux:
        loss = FluxMatching(field, sigma, FluxOptions(strata=STRATA, backend=run.backend), refs=refs)
    else:
        loss = DenoisingScoreMatching(field, sigma, DSMOptions(backend=run.backend), refs=refs)
    margin = {"": 0.0, "gentle": config.gentle_margin, "inward": config.margin}[variant.penalty]
    return BoundaryMatching(loss, problem.domain, sigma, config.weight if variant.penalty else 0.0, margin)


def train(run: Run, name: str, variant: str, seed: int, start: FixedLevelField | None = None) -> FixedLevelField:
    """Train, or resume training, and return the averaged field.

    Args:
        run: settings, random numbers, backend, device and folder.
        name: one of `PROBLEMS`.
        variant: one of `VARIANTS`.
        seed: determines initial weights, minibatches and noise.
        start: trained field whose network is trained further; None for a new network.
    """
    config, x = run.config, data(run, name)
    steps, lr = (config.steps, config.lr) if start is None else (config.further_steps, config.further_lr)
    options = TrainingOptions(
        steps, config.batch, lr=lr, optimizer="adam", ema=config.ema, progress=False,
        seed=run.generator("training", seed, variant).initial_seed() >> 1, accelerator=str(run.device),
    )  # fmt: skip
    field = make_field(run, PROBLEMS[name], VARIANTS[variant], x.std().item(), seed)
    if start is not None:
        field.network.load_state_dict(start.network.state_dict())
    trainer = Trainer(
        make_loss(run, PROBLEMS[name], VARIANTS[variant], field, x),
        x,
        options,
        folder=run.out / "models" / f"{name}-{variant}-{seed}".replace(", ", "-").replace(" ", "-"),
        lr_factor=cosine_decay(steps),
    )
    trainer.run()
    run.save_seconds()
    trained = averaged_field(trainer).requires_grad_(False)
    assert isinstance(trained, FixedLevelField)
    return trained
