"""Training of the fields that are added to a score, and of the score model that one of them is added to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.augment import problems
from experiments.augment.fields import LearnedField, Score, StreamField, TurnedScore
from experiments.augment.problems import MixtureProblem
from experiments.common.networks import FixedLevelField
from experiments.common.objectives import averaged_field
from experiments.common.run import Run
from experiments.common.schedules import cosine_decay
from fluxmatching import (
    AugmentedField,
    CosineFeatures,
    DenoisingScoreMatching,
    DSMOptions,
    FluxOptions,
    Trainer,
    TrainingOptions,
    augmentation_loss,
    autocorrelation_loss,
    quadratic_flux_loss,
    step_defect_loss,
)
from fluxmatching.losses.modules import Logged

SCORE, EXACT, LEARNED = "score", "score + exact v", "score + learned v"
TRAINED, TRAINED_LEARNED = "trained score", "trained score + learned v"
CHAIN_STEPS = 4  # after which the law of the chain is compared


class MixtureLoss(nn.Module):
    """Loss of v on a mixture: memory, step defect and the law after four steps; for learned v the augmentation loss.

    λ_aug ν⁴ ℓ_aug/2 + ℓ_autocorrelation + λ_defect ℓ_defect + λ_law ℓ_law, with ν² the variance of a component of p_σ,
    h = σ²/2, and ℓ_law the energy distance between four Langevin steps from p_σ and p_σ, in units of ν. The mixture is
    its own kernel density estimate, with its means as reference points.

    Args:
        field: s + v.
        problem: p_σ.
        flux_weight: λ_aug; 0 for a v that keeps p_σ anyhow.
        defect_weight, law_weight: λ_defect and λ_law.
        backend: backend of the ops.
    """

    def __init__(
        self,
        field: AugmentedField,
        problem: MixtureProblem,
        *,
        flux_weight: float,
        defect_weight: float,
        law_weight: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.field, self.problem = field, problem
        self.weights = flux_weight, defect_weight, law_weight
        self.options = FluxOptions(backend=backend)
        sample = problem.mixture.sample(4096, torch.Generator().manual_seed(0))
        self.features = CosineFeatures.draw(sample, 32)

    def forward(self, x: Tensor, *, seed: int | Tensor) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and its terms, for a minibatch of component means `[N, D]`."""
        flux_weight, defect_weight, law_weight = self.weights
        mixture, unit = self.problem.mixture, self.problem.unit
        generator = torch.Generator().manual_seed(int(seed))
        noised = x + math.sqrt(unit) * torch.randn(x.shape, generator=generator)
        step_size = self.problem.sigma**2 / 2
        terms = {
            "memory": autocorrelation_loss(self.field, noised, self.features)[0],
            "defect": step_defect_loss(self.field, noised, step_size).mean(),
        }
        loss = terms["memory"] + defect_weight * terms["defect"]
        if flux_weight:
            flux = augmentation_loss(self.field.v, x, math.sqrt(unit), self.options, refs=mixture.means, seed=seed)
            terms["flux"] = unit**2 / 2 * flux.mean()
            moved = noised[: len(x) // 2]
            for _ in range(CHAIN_STEPS):
                noise = torch.randn(moved.shape, generator=generator)
                moved = moved + step_size * self.field(moved) + math.sqrt(2 * step_size) * noise
            others = mixture.sample(len(moved), generator)
            terms["law"] = energy_distance(moved, others) / math.sqrt(unit)
            loss = loss + flux_weight * terms["flux"] + law_weight * terms["law"]
        return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


class GaussianLoss(nn.Module):
    """Loss of a linear v on a Gaussian, from points whose covariance is exactly Σ: no sampling noise.

    For learned v the flux loss is the dual one of s + v over all linear and quadratic functions, which is exact here.
    An augmentation loss would need a density estimate in 16 dimensions. The step size h is half the smallest variance.

    Args:
        field: s + v.
        unit: smallest variance.
        flux_weight: weight of the flux loss; 0 for a v that keeps p anyhow.
        defect_weight: weight of the step defect.
    """

    def __init__(self, field: AugmentedField, unit: float, *, flux_weight: float, defect_weight: float) -> None:
        super().__init__()
        self.field, self.unit, self.flux_weight, self.defect_weight = field, unit, flux_weight, defect_weight

    def forward(self, x: Tensor, *, seed: int | Tensor) -> tuple[Tensor, Logged]:
        """Return the loss `[]` and its terms, for the points `[2D, D]`; nothing is random."""
        terms = {
            "memory": autocorrelation_loss(self.field, x)[0],
            "defect": step_defect_loss(self.field, x, self.unit / 2).mean(),
        }
        loss = terms["memory"] + self.defect_weight * terms["defect"]
        if self.flux_weight:
            terms["flux"] = self.unit * quadratic_flux_loss(self.field, x)[0]
            loss = loss + self.flux_weight * terms["flux"]
        return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Estimate 2E|X - Y| - E|X - X'| - E|Y - Y'| without bias, `[]`."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * torch.cdist(x, y).mean() - within[0] - within[1]


def train(
    run: Run, loss: nn.Module, data: Tensor, key: str, seed: int, *, steps: int, batch: int, lr: float | None = None
) -> nn.Module:
    """Train, or resume training, and return the averaged field."""
    options = TrainingOptions(
        steps, batch, lr=run.config.lr if lr is None else lr, optimizer="adam", ema=run.config.ema, accelerator="cpu",
        progress=run.progress, seed=run.generator("training", key, seed).initial_seed() >> 1,
    )  # fmt: skip
    folder = run.out / "models" / f"{key}-{seed}".replace(" ", "-").replace(",", "").replace("=", "")
    trainer = Trainer(loss, data, options, folder=folder, lr_factor=cosine_decay(steps))
    trainer.run()
    run.save_seconds()
    return averaged_field(trainer).requires_grad_(False)


def component_means(run: Run, problem: MixtureProblem, seed: int) -> Tensor:
    """Draw the data of the trainings: means of components, to which the loss adds all noise, `[n, D]`."""
    return problem.mixture.sample_means((run.config.data,), run.generator("data", seed))


def train_score(run: Run, problem: MixtureProblem, seed: int) -> nn.Module:
    """Train a score model of p_σ by denoising score matching, and return it as f(x)."""
    level = math.sqrt(problem.unit)
    with run.drawing("score model", seed):
        model = FixedLevelField(problem.mixture.dim, run.config.score_width, level, problem.mixture.means.std().item())
    loss = DenoisingScoreMatching(model, level, DSMOptions(backend=run.backend))
    data = component_means(run, problem, seed)
    return train(run, loss, data, "score", seed, steps=run.config.score_steps, batch=run.config.batch)


def train_mixture(run: Run, name: str, problem: MixtureProblem, score: Score, kind: str, seed: int) -> nn.Module:
    """Train the field v of a kind on a mixture, and return s + v."""
    config, mixture = run.config, problem.mixture
    exact = kind == EXACT
    spread = mixture.means.std().item()
    v: nn.Module
    with run.drawing("v", name, kind, seed):
        if exact:
            v = StreamField(score, mixture.dim, spread, 1 if mixture.dim == 2 else config.terms, config.width)
        else:
            v = LearnedField(score, mixture.dim, math.sqrt(problem.unit), config.width)
    loss = MixtureLoss(
        AugmentedField(score, v),
        problem,
        flux_weight=0.0 if exact else config.flux_weight,
        defect_weight=config.defect_weight,
        law_weight=config.law_weight,
        backend=run.backend,
    )
    data = component_means(run, problem, seed)
    steps = config.exact_steps if exact else config.steps
    return train(run, loss, data, f"{name}-{kind}", seed, steps=steps, batch=config.batch)


def train_gaussian(run: Run, variances: Tensor, kind: str, seed: int) -> Tensor:
    """Train the linear field v of a kind on a Gaussian, and return the matrix of s + v, `[D, D]` float64."""
    config, dim = run.config, len(variances)
    score = GaussianScore(variances)
    exact = kind == EXACT
    v: nn.Module
    with run.drawing("v", problems.GAUSSIAN, kind, seed):
        v = TurnedScore(score, dim) if exact else LearnedField(score, dim, 1.0, 0)
    weights = {
        "flux_weight": 0.0 if exact else config.gaussian_flux_weight,
        "defect_weight": config.gaussian_defect_weight,
    }
    loss = GaussianLoss(AugmentedField(score, v).double(), variances.min().item(), **weights)
    corners = math.sqrt(dim) * variances.sqrt().diag()
    data = torch.cat([corners, -corners])
    field = train(
        run,
        loss,
        data,
        f"{problems.GAUSSIAN}-{kind}",
        seed,
        steps=config.gaussian_steps,
        batch=len(data),
        lr=config.gaussian_lr,
    )
    return field(torch.eye(dim, dtype=torch.float64)).T


class GaussianScore:
    """Score -Σ⁻¹x of a centered Gaussian with diagonal Σ."""

    def __init__(self, variances: Tensor) -> None:
        self.variances = variances

    def __call__(self, x: Tensor) -> Tensor:
        return -x / self.variances
