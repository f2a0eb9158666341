"""Fit of a drift by every method in one setting, and comparison with interventions that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.causal.data import Environment, System, make_environments, make_system, shift_of, simulate
from experiments.causal.drifts import Basis, BasisDrift
from experiments.causal.dual import dual_quadratic
from experiments.causal.fit import Fit, Problem, Term, best_size
from experiments.causal.flux import FluxSettings, flux_quadratic
from experiments.causal.kds import gaussian_kds, pairs_kds
from experiments.causal.quadratic import Quadratic
from experiments.common.distances import wasserstein2
from experiments.common.kernel_weights import mean_perplexity
from experiments.common.run import Run
from fluxmatching import CosineFeatures

NO_EFFECT, TRUTH = "no effect", "true drift"
DUAL, QUADRATIC = "dual", "dual, quadratic"
GAUSSIAN, PAIRS = "KDS, Gaussian", "KDS, pairs"
FLUX, SMOOTHED = "flux", "flux, smoothed"
METHODS = (DUAL, QUADRATIC, GAUSSIAN, PAIRS, FLUX, SMOOTHED)
COSTLY = (PAIRS, SMOOTHED)  # methods for few dimensions only
NOISE = 1.0  # σ of all systems
FOLDS = 3  # of the interventions, in the choice of λ
EDGE = 0.1  # strength above which a dependence counts as an edge
SHARE = 0.5  # of the error of "no effect": what counts as a prediction
BOX = 10.0  # standard deviations within which simulations of fitted drifts are kept


@dataclass(frozen=True)
class Setting:
    """One system with its environments.

    Attributes:
        kind, d, seed: of the system.
        system: the truth.
        basis: of the fitted drifts.
        train: observational data first, then the interventions for fits and validation.
        held_out: interventions on other variables.
    """

    kind: str
    d: int
    seed: int
    system: System
    basis: Basis
    train: list[Environment]
    held_out: list[Environment]

    @property
    def folds(self) -> list[list[int]]:
        """Indices of the training interventions in each fold of the cross-validation."""
        count = min(FOLDS, len(self.train) - 1)
        return [list(range(first, len(self.train), count)) for first in range(1, 1 + count)]

    @property
    def edges(self) -> Tensor:
        """Which parameters of the drift are those of a pair i ≠ j, bool `[Q]`; not constants and own coordinates."""
        rows, functions = self.basis.entries
        coordinates = self.basis.coordinates[functions]
        return (coordinates >= 0) & (coordinates != rows)

    @property
    def constants(self) -> list[int]:
        """Index of the constant of each entry of the drift among the parameters."""
        return (self.basis.entries[1] == 0).nonzero()[:, 0].tolist()

    def drift(self, theta: Tensor) -> BasisDrift:
        """Return the drift with parameters `[..., Q]`."""
        return BasisDrift(self.basis, self.basis.full(theta))


def make_setting(run: Run, kind: str, d: int, seed: int) -> Setting:
    """Draw a system, and samples of it under no intervention, and under interventions on different variables."""
    config = run.config
    generator = run.generator("system", kind, d, seed)
    system = make_system(kind, d, config.parents, NOISE, generator)
    order = torch.randperm(d, generator=generator).tolist()
    count = math.ceil(d / 2)
    held_out = order[count:][: config.held_out]
    targets: list[int | None] = [None, *order[:count], *held_out]
    found = make_environments(system, targets, config.samples, config.time, config.step, generator)
    pooled = torch.cat([environment.x for environment in found[: count + 1]])
    return Setting(
        kind, d, seed, system, Basis.of(pooled, kind != "linear"), found[: count + 1], found[count + 1 :]
    )  # fmt: skip


def make_objective(run: Run, setting: Setting, method: str) -> Callable[[Tensor], Quadratic]:
    """Return the function that makes the objective of a method, of `[Q]` parameters, from samples of an environment."""
    config, basis = run.config, setting.basis
    if method == GAUSSIAN:
        return lambda x: gaussian_kds(x, basis, NOISE, config.length * setting.d**0.5)
    if method == PAIRS:
        return lambda x: pairs_kds(x[: config.pairs_samples], basis, NOISE, config.length)
    if method in (FLUX, SMOOTHED):
        options = flux_settings(run, setting.d, method)
        generator = run.generator("flux", setting.kind, setting.d, setting.seed)
        return lambda x: flux_quadratic(x, basis, NOISE, options, generator)

    def dual(x: Tensor) -> Quadratic:
        cosines = None
        if method == DUAL:
            cosines = CosineFeatures.draw(x, config.cosines, num_coordinates=2, seed=setting.seed)
        return dual_quadratic(x, basis, NOISE, cosines, config.ridge)

    return dual


def flux_settings(run: Run, d: int, method: str) -> FluxSettings:
    """Return the settings of the flux loss, as written or smoothed. Third moments make smoothed chains costly."""
    config = run.config
    if method == FLUX:
        return FluxSettings(config.sigma, config.chains, config.horizons, smoothed=False, backend=run.backend)
    sigma = config.smoothed_sigma * d**0.5
    return FluxSettings(sigma, config.smoothed_chains, config.horizons, smoothed=True, backend=run.backend)


def fit(run: Run, setting: Setting, method: str) -> tuple[Fit, float]:
    """Fit a drift, the strength of the penalty chosen by interventions left out in turn; return it and CPU seconds."""
    begun = time.process_time()
    objective = make_objective(run, setting, method)
    terms = []
    for environment in setting.train:
        target, size = environment.target, None
        if target is not None and run.config.known:
            size = environment.shift / setting.basis.scale[target].item()
        index = None if target is None else setting.constants[target]
        terms.append(Term(objective(environment.x), index, size))
    folds, fractions = setting.folds, sorted(run.config.fractions, reverse=True)
    problem = Problem.of([[terms[0]], *([terms[k] for k in fold] for fold in folds)], setting.edges)
    paths = [problem.path(fractions, left_out=part) for part in range(1, 1 + len(folds))]
    observed, *others = [environment.x.mean(0) for environment in setting.train]
    no_effect = sum(errors_of_means(setting, observed, mean).item() for mean in others)
    errors: list[float] = []
    for found in zip(*paths, strict=True):
        errors.append(sum(validate(run, setting, terms, *pair) for pair in zip(found, folds, strict=True)))
        best = errors.index(min(errors))
        if len(setting.basis.scale) <= run.config.patient_d:
            continue
        # Strong penalties may predict worse and worse before the right one, but none of them well.
        if len(errors) - 1 - best >= run.config.patience and errors[best] < SHARE * no_effect:
            break
    return next(problem.path([fractions[best]])), time.process_time() - begun


def validate(run: Run, setting: Setting, terms: Sequence[Term], found: Fit, fold: list[int]) -> float:
    """Return the error of the means in environments that were left out, summed over them."""
    means = torch.stack([setting.train[k].x.mean(0) for k in fold])
    shifts = torch.zeros_like(means)
    for shift, k in zip(shifts, fold, strict=True):
        target, size = setting.train[k].target, setting.train[k].shift
        assert target is not None
        if terms[k].size is None:
            size = best_size(terms[k], found.theta) * setting.basis.scale[target].item()
        shift[target] = size
    x = predict(run, setting, setting.drift(found.theta), shifts, run.config.validation_samples)
    return errors_of_means(setting, x.mean(-2), means).sum().item()


def predict(run: Run, setting: Setting, drift: BasisDrift | None, shifts: Tensor, samples: int) -> Tensor:
    """Simulate a fitted drift, or the true one, under shifts `[E, d]`; return `[E, samples, d]`.

    A fitted drift is simulated inside a box of `BOX` standard deviations, since it may be unstable.
    """
    d, basis, config = setting.d, setting.basis.single(), run.config
    generator = run.generator("predict", setting.kind, d, setting.seed)
    start = basis.center + basis.scale * torch.randn(len(shifts), samples, d, generator=generator)
    low, high = basis.center - BOX * basis.scale, basis.center + BOX * basis.scale
    used: Callable[[Tensor], Tensor] = setting.system.single() if drift is None else Boxed(drift.single(), low, high)
    x = simulate(used, start, shifts[:, None].float(), NOISE, config.time, config.step, generator)
    return x.clamp(low, high).double()


@dataclass(frozen=True)
class Boxed:
    """Drift that is that of the nearest point of a box, and pulls back into it outside."""

    drift: Callable[[Tensor], Tensor]
    low: Tensor
    high: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        inside = x.clamp(self.low, self.high)
        return self.drift(inside).clamp(-100, 100) + 5 * (inside - x)


def errors_of_means(setting: Setting, found: Tensor, wanted: Tensor) -> Tensor:
    """Return the root mean square over variables of the error of means, in standard deviations of observations."""
    return ((found - wanted) / setting.train[0].x.std(0)).square().mean(-1).sqrt()


def structure(setting: Setting, found: Fit) -> dict[str, float]:
    """Return F1 of edges stronger than `EDGE`, and the average precision of all pairs ranked by strength."""
    strengths = setting.drift(found.theta).strengths(setting.train[0].x)
    off = ~torch.eye(setting.d, dtype=torch.bool)
    scores, truth = strengths[off], setting.system.parents[off]
    hits = (truth & (scores > EDGE)).sum().item()
    ranked = truth[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    return {
        "f1": 2 * hits / ((scores > EDGE).sum() + truth.sum()).item(),
        "precision": ((precision * ranked).sum() / ranked.sum()).item(),
    }


def methods_at(run: Run, d: int) -> list[str]:
    """Return the methods that are fitted in d dimensions."""
    return [name for name in run.config.methods if name not in COSTLY or d <= run.config.costly_d]


def measure(run: Run, kind: str, d: int, seed: int) -> None:
    """Log missing rows "fit" of one setting, one per method."""
    done = {row["method"] for row in run.rows("fit") if (row["setting"], row["d"], row["seed"]) == (kind, d, seed)}
    wanted = [name for name in (NO_EFFECT, TRUTH, *methods_at(run, d)) if name not in done]
    if not wanted:
        return
    setting = make_setting(run, kind, d, seed)
    for method in wanted:
        row: dict[str, Any] = {}
        found = None
        if method not in (NO_EFFECT, TRUTH):
            found, seconds = fit(run, setting, method)
            row = {"seconds": seconds, "fraction": found.fraction, "violation": found.violation}
            row |= structure(setting, found)
        if method in (FLUX, SMOOTHED):
            sigma = flux_settings(run, d, method).sigma
            x = setting.train[0].x
            noise = torch.randn(x.shape, generator=run.generator("centers", seed), dtype=x.dtype)
            row["centers"] = mean_perplexity(x + sigma * noise, x, sigma)
        row |= compare(run, setting, method, found)
        run.log(kind="fit", setting=kind, d=d, seed=seed, method=method, **row)


def compare(run: Run, setting: Setting, method: str, found: Fit | None) -> dict[str, float]:
    """Return the error of means and W2 of standardized samples, averaged over the interventions held out."""
    held_out, scale = setting.held_out, setting.train[0].x.std(0)
    if method == NO_EFFECT:
        x = setting.train[0].x.expand(len(held_out), -1, -1)
    else:
        shifts = torch.stack([shift_of(e.target, e.shift, setting.d) for e in held_out])
        drift = None if found is None else setting.drift(found.theta)
        x = predict(run, setting, drift, shifts, run.config.samples)
    truth = torch.stack([environment.x for environment in held_out])
    count = run.config.distance_samples
    distances = [
        wasserstein2(one[:count] / scale, other[:count] / scale) for one, other in zip(x, truth, strict=True)
    ]  # fmt: skip
    return {
        "error": errors_of_means(setting, x.mean(1), truth.mean(1)).mean().item(),
        "w2": sum(distances) / len(distances),
    }
