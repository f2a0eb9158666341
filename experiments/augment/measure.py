"""Measurements: the ranking of known fields, and the cost of chains of every field by schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.augment import chains, problems, training
from experiments.augment.chains import Field
from experiments.augment.problems import MixtureProblem
from experiments.augment.training import EXACT, LEARNED, SCORE, TRAINED, TRAINED_LEARNED
from experiments.common.autocorrelation import integrated_autocorrelation_time
from experiments.common.rotation import quarter_turn
from experiments.common.run import Run
from fluxmatching import CosineFeatures, autocorrelation_loss, mixing_loss, step_defect_loss, unadjusted_langevin

TURNS = (0.0, 1.0, 2.0)


def circulating(problem: MixtureProblem, turn: float) -> Field:
    """Return s + αJs with a quarter turn J, α = turn."""

    def field(z: Tensor) -> Tensor:
        score = problem.mixture.score(z)
        return score + turn * quarter_turn(score)

    return field


def rank(run: Run) -> None:
    """Log missing rows "ranking": autocorrelation time measured, both losses, and the paper's proxy, of s + αJs."""
    done = {(row["turn"], row["seed"]) for row in run.rows("ranking")}
    problem = problems.make_mixture(problems.plane(problems.SIGMA))
    sigma = problem.sigma
    for seed in range(run.config.seeds):
        for turn in TURNS:
            if (turn, seed) in done:
                continue
            field = circulating(problem, turn)
            x = problem.mixture.sample(run.config.ranking_samples, run.generator("ranking", seed))
            features = CosineFeatures.draw(x, 32, seed=seed)
            # The proxy takes data and adds noise of σ itself. It needs small minibatches: it compares all pairs.
            data = problem.mixture.sample_means((run.config.proxies * 256,), run.generator("proxy", seed))
            data = data + problems.VARIANCE**0.5 * torch.randn(data.shape, generator=run.generator("noise", seed))
            proxies = [proxy(field, part, sigma, k) for k, part in enumerate(data.split(256))]
            run.log(
                kind="ranking", turn=turn, seed=seed, time=measured_time(run, problem, field, seed),
                loss=autocorrelation_loss(field, x, features)[0],
                defect=step_defect_loss(field, x, sigma**2 / 2).mean(), proxy=torch.stack(proxies).mean(),
            )  # fmt: skip


def proxy(field: Field, x: Tensor, sigma: float, seed: int) -> Tensor:
    """Return the paper's proxy of mixing on a minibatch of data, `[]`."""
    return mixing_loss(lambda z, _: field(z), x, sigma, seed=seed)[0]


def measured_time(run: Run, problem: MixtureProblem, field: Field, seed: int) -> float:
    """Return the integrated autocorrelation time of Langevin chains from exact samples, in units of σ²."""
    step_size: float = run.config.ranking_step_size
    start = problem.mixture.sample(run.config.ranking_chains, run.generator("ranking chains", seed))
    path: list[Tensor] = []
    unadjusted_langevin(
        field, start, step_size=step_size * problem.sigma**2, num_steps=run.config.ranking_steps,
        generator=run.generator("ranking noise", seed), callback=lambda _, x: path.append(x),
    )  # fmt: skip
    states = torch.stack(path)
    return step_size * max(integrated_autocorrelation_time(values) for values in states.unbind(-1))


def compare(run: Run) -> None:
    """Train the fields that are missing, and log the cost of their chains: rows "cost", then one row "measured"."""
    done = {(row["problem"], row["field"], row["seed"]) for row in run.rows("measured")}
    wanted = [(seed, name) for seed in range(run.config.seeds) for name in problems.PROBLEMS]
    for seed, name in run.bar(wanted, "compare"):
        for kind in kinds(run, name):
            if (name, kind, seed) not in done:
                compare_one(run, name, kind, seed)


def kinds(run: Run, name: str) -> list[str]:
    """Return the fields that are compared on a problem."""
    found = [SCORE, EXACT]
    if name in (*run.config.learned_on, problems.GAUSSIAN):
        found.append(LEARNED)
    if name == problems.plane(problems.SIGMA):
        found += [TRAINED, TRAINED_LEARNED]
    return found


def compare_one(run: Run, name: str, kind: str, seed: int) -> None:
    """Log the cost of the chains of one field with the best schedules of each kind."""
    if name == problems.GAUSSIAN:
        variances = problems.gaussian_variances(run.config.gaussian_dim, run.config.condition)
        matrix = (
            -variances.reciprocal().diag() if kind == SCORE else training.train_gaussian(run, variances, kind, seed)
        )
        costs = chains.measure_gaussian(matrix, variances, chains.gaussian_schedules()[:: run.config.thinning])
    else:
        problem = problems.make_mixture(name)
        costs = chains.measure_mixture(
            make_field(run, name, problem, kind, seed),
            problem,
            chains.mixture_schedules()[:: run.config.thinning],
            run.config.evaluations * (2 if problem.sigma < 0.5 else 1),
            run.config.chains,
            run.generator("chains", name, seed).initial_seed(),
        )
    logged = {tuple(row[c] for c in ("problem", "field", "seed", "schedule", "sizes")) for row in run.rows("cost")}
    for schedule, cost in chains.best(costs).items():
        sizes = " ".join(f"{size:.3g}" for size in schedule.sizes)
        if (name, kind, seed, schedule.kind, sizes) not in logged:
            run.log(
                kind="cost", problem=name, field=kind, seed=seed, schedule=schedule.kind, sizes=sizes,
                evaluations=cost.evaluations, bias=cost.bias,
            )  # fmt: skip
    run.log(kind="measured", problem=name, field=kind, seed=seed)


def make_field(run: Run, name: str, problem: MixtureProblem, kind: str, seed: int) -> Field:
    """Make a field on a mixture, trained if it has to be."""
    if kind == SCORE:
        return problem.mixture.score
    if kind in (EXACT, LEARNED):
        return training.train_mixture(run, name, problem, problem.mixture.score, kind, seed)
    model: nn.Module = training.train_score(run, problem, seed)
    return model if kind == TRAINED else training.train_mixture(run, name, problem, model, kind, seed)
