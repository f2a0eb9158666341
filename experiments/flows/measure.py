"""Measures of trained flows: distance to the data by evaluations, straightness, and variance of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.distances import wasserstein2
from experiments.common.run import Run
from experiments.flows.problems import Problem, draw
from experiments.flows.training import Variant, model_folder
from fluxmatching import FlowOptions, ODESolver, conditional_flow_matching_loss, integrate_flow, straightness

EULER, HEUN = "Euler", "Heun"
SOLVERS = {EULER: ("euler", 1), HEUN: ("heun", 2)}  # and their evaluations per step
SINGLE, STABLE = TARGETS = ("single sample", "posterior mean")
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)  # at which the variance of the gradient is measured


def key_of(problem: Problem, variant: Variant, seed: int) -> dict[str, Any]:
    """Return the entries by which rows of a training are found."""
    return {"problem": problem.name, "variant": variant.name, "seed": seed}


def start_and_new(run: Run, problem: Problem, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Draw starts of samples and new data to compare with, `[samples, 2]` each, the same for all variants."""
    count, key = run.config.samples, (problem.name, seed, index)
    return draw(run, problem.source, count, "start", *key), draw(run, problem.target, count, "new", *key)


def log_floors(run: Run, problem: Problem, seed: int) -> None:
    """Log W2 of more new data to the new data: what a perfect flow would have (rows "floor")."""
    config, key = run.config, {"problem": problem.name, "seed": seed}
    done = {row["index"] for row in run.rows("floor") if key.items() <= row.items()}
    for index in range(config.repeats):
        if index not in done:
            more = draw(run, problem.target, config.samples, "more", problem.name, seed, index)
            _, new = start_and_new(run, problem, seed, index)
            run.log(kind="floor", **key, index=index, w2=wasserstein2(more, new))


def log_repeats(run: Run, problem: Problem, variant: Variant, seed: int, field: nn.Module) -> None:
    """Log W2 in the most evaluations for several starts and new data (rows "repeat"), with less noise than one has."""
    config, key = run.config, key_of(problem, variant, seed)
    done = {row["index"] for row in run.rows("repeat") if key.items() <= row.items()}
    solver = ODESolver("heun", num_steps=max(config.evaluations) // 2)
    for index in range(config.repeats):
        if index not in done:
            start, new = start_and_new(run, problem, seed, index)
            found = integrate_flow(field, start, end=variant.end, solver=solver)
            run.log(kind="repeat", **key, index=index, w2=wasserstein2(found, new))


def log_distances(run: Run, problem: Problem, variant: Variant, seed: int, field: nn.Module) -> None:
    """Log W2 of the flow's samples to new data, by solver and number of evaluations (rows "distance").

    All variants of a seed have the same start and the same data to compare with.
    """
    config, key = run.config, key_of(problem, variant, seed)
    done = {(row["solver"], row["evaluations"]) for row in run.rows("distance") if key.items() <= row.items()}
    start, new = start_and_new(run, problem, seed, 0)
    for name, (method, per_step) in SOLVERS.items():
        for count in config.evaluations:
            if count % per_step or (name, count) in done:
                continue
            solver = ODESolver(method, num_steps=count // per_step)
            found = integrate_flow(field, start, end=variant.end, solver=solver)
            run.log(kind="distance", **key, solver=name, evaluations=count, w2=wasserstein2(found, new))


def log_trajectories(run: Run, problem: Problem, variant: Variant, seed: int, field: nn.Module) -> None:
    """Log bend and length of the trajectories (a row "trajectories"), and keep some for the figures."""
    config = run.config
    start, _ = start_and_new(run, problem, seed, 0)
    found, bend, length = bend_and_length(field, start, variant.end, config.sections)
    torch.save(found[:, : config.shown].cpu().clone(), trajectory_file(run, problem, variant, seed))
    run.log(kind="trajectories", **key_of(problem, variant, seed), bend=bend, length=length, ratio=bend / length)


def bend_and_length(
    field: nn.Module, start: Tensor, end: float, sections: int, chunk_size: int | None = None
) -> tuple[Tensor, float, float]:
    """Return trajectories by Heun's method, `[sections + 1, *start.shape]`, their bend and their length.

    Both are mean squares: the bend is ∫|dx/dt - (x(1) - x(0))|² dt, the length |x(1) - x(0)|². Their ratio is 0 for
    straight lines and does not depend on the scale.
    """
    times = torch.linspace(0, end, sections + 1, dtype=torch.float64)
    solver = ODESolver("heun", num_steps=sections)
    found = integrate_flow(field, start, times=times, solver=solver, chunk_size=chunk_size)
    length = (found[-1] - found[0]).square().flatten(1).sum(1).mean()
    return found, straightness(found, times).item(), length.item()


def trajectory_file(run: Run, problem: Problem, variant: Variant, seed: int) -> Any:
    """Return the file that keeps some trajectories, `[sections + 1, shown, 2]`."""
    return model_folder(run, problem, variant, seed) / "trajectories.pt"


def log_targets(run: Run, data: Tensor, seed: int, field: nn.Module) -> None:
    """Log variances of loss and gradient by target, at random and at fixed times (rows "target").

    Both targets have the same network, x0, x1 and t, and hence the same x_t.

    Args:
        run: settings and random numbers.
        data: training samples, which are the reference points, `[data, 2]`.
        seed: seed of the training.
        field: v(x, t).
    """
    done = {(row["target"], row["t"]) for row in run.rows("target") if row["seed"] == seed}
    for t in (None, *TIMES):
        for target in TARGETS:
            if (target, t) in done:
                continue
            losses, gradients = sample_gradients(run, data, seed, field, target, t)
            run.log(
                kind="target",
                seed=seed,
                target=target,
                t=t,
                loss=losses.mean(),
                loss_variance=losses.var(),
                gradient_variance=gradients.var(0).sum(),
            )


def sample_gradients(
    run: Run, data: Tensor, seed: int, field: nn.Module, target: str, t: float | None
) -> tuple[Tensor, Tensor]:
    """Return losses `[minibatches, batch]` and the gradients of their means `[minibatches, parameters]`, in float64."""
    config, parameters = run.config, list(field.requires_grad_(True).parameters())
    options = FlowOptions(stable_target=target == STABLE, backend=run.backend)
    refs = data if options.stable_target else None
    losses, gradients = [], []
    for index in range(config.minibatches):
        generator = run.generator("minibatch of targets", seed, index)
        rows = torch.randint(len(data), (config.batch,), generator=generator).to(data.device)
        noise = generator.initial_seed()
        loss = conditional_flow_matching_loss(field, data[rows], options, t=t, refs=refs, seed=noise)
        losses.append(loss.detach().double())
        found = torch.autograd.grad(loss.mean(), parameters)
        gradients.append(torch.cat([one.flatten() for one in found]).double())
    return torch.stack(losses), torch.stack(gradients)
