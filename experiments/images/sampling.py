"""Samples and likelihoods of a trained field, one batch at a time so that a long run can resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.common.clock import Clock
from experiments.common.run import Run
from experiments.common.sampling import on_device
from experiments.images.datasets import to_bytes, to_numbers
from experiments.images.training import start_noise
from fluxmatching import ODESolver, bits_per_dim, edm_heun, karras_schedule, log_likelihood, probability_flow

BATCH = 250
LEVEL = 2 / 255  # distance of neighboring bytes in the units of the images


def sample(
    run: Run,
    field: nn.Module,
    count: int,
    shape: tuple[int, ...],
    desc: str,
    *,
    keep: Path | None = None,
    clock: Clock | None = None,
) -> Tensor:
    """Draw bytes `[count, *shape]` with the preset's sampler, from the same noise for every field; see `in_batches`."""
    config = run.config

    def draw(start: Tensor, batch: int) -> Tensor:
        if config.sampling_steps:
            return edm_heun(field, start, karras_schedule(config.sampling_steps, config.sigma_min, config.sigma_max))
        return probability_flow(
            field, start, sigma_min=config.sigma_min, sigma_max=config.sigma_max, solver=solver(run)
        )

    return in_batches(run, draw, count, shape, desc, keep=keep, clock=clock)


def solver(run: Run) -> ODESolver:
    """Adaptive Heun at the preset's tolerance."""
    return ODESolver(rtol=run.config.tolerance, atol=run.config.tolerance)


def in_batches(
    run: Run,
    draw: Callable[[Tensor, int], Tensor],
    count: int,
    shape: tuple[int, ...],
    desc: str,
    *,
    keep: Path | None = None,
    clock: Clock | None = None,
) -> Tensor:
    """Run a sampler on batches of start noise; returns bytes `[count, *shape]`.

    Args:
        draw: (noise, number of the batch) -> samples.
        keep: folder for the batches of a long run, which then resumes, and may pause by `clock`.
    """
    parts = []
    for batch in run.bar(range((count + BATCH - 1) // BATCH), desc):
        file = None if keep is None else keep / f"{batch:04d}.pt"
        if file is not None and file.exists():
            parts.append(torch.load(file, weights_only=True))
            continue
        if clock is not None:
            clock.check(desc)
        found = draw(start_noise(run, min(BATCH, count - batch * BATCH), shape, batch), batch)
        parts.append(to_bytes(found).cpu())
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            torch.save(parts[-1], part)
            part.replace(file)
    return torch.cat(parts)


def likelihood(run: Run, field: nn.Module, objective: str, test: Tensor, clock: Clock) -> float:
    """Mean bits per dimension of images with uniform noise of one level; logs one row per batch."""
    config = run.config
    batches = test.split(config.batch)
    done = {row["batch"] for row in run.rows("likelihood") if row["objective"] == objective}
    for batch in run.bar(range(len(batches)), f"{objective}: likelihood"):
        if batch in done:
            continue
        clock.check(f"the likelihood of {objective}")
        generator = run.generator("likelihood", batch)
        x = to_numbers(batches[batch])
        x = x + LEVEL * (torch.rand(x.shape, generator=generator) - 0.5)
        probe = on_device(generator, run.device)
        found = log_likelihood(
            field,
            x.to(run.device),
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            generator=probe,
            solver=solver(run),
        )
        bits = bits_per_dim(found, x[0].numel(), LEVEL)
        run.log(kind="likelihood", objective=objective, batch=batch, bits=bits.sum())
    return sum(row["bits"] for row in run.rows("likelihood") if row["objective"] == objective) / len(test)
