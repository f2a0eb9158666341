"""Samples and likelihoods of a trained field, a batch at a time so that a long run resumes."""

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
from fluxmatching import bits_per_dim, edm_heun, edm_sigma_grid, log_likelihood, probability_flow

BATCH = 250
LEVEL = 2 / 255  # distance of neighbouring bytes in the units of the images


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
    """Bytes `[count, *shape]`, by the preset's sampler, from the same noise for every field; see `in_batches`."""
    config = run.config

    def draw(start: Tensor, batch: int) -> Tensor:
        if config.sampling_steps:
            return edm_heun(field, start, edm_sigma_grid(config.sampling_steps, config.sigma_min, config.sigma_max))
        return probability_flow(
            field, start, sigma_min=config.sigma_min, sigma_max=config.sigma_max,
            rtol=config.tolerance, atol=config.tolerance,
        )  # fmt: skip

    return in_batches(run, draw, count, shape, desc, keep=keep, clock=clock)


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
    """Bytes `[count, *shape]` of what a sampler makes of the noise it is given.

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
    """Mean bits a dimension of images with uniform noise of one level; logs a row a batch."""
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
            field, x.to(run.device), sigma_min=config.sigma_min, sigma_max=config.sigma_max, generator=probe,
            rtol=config.tolerance, atol=config.tolerance,
        )  # fmt: skip
        bits = bits_per_dim(found, x[0].numel(), LEVEL)
        run.log(kind="likelihood", objective=objective, batch=batch, bits=bits.sum())
    return sum(row["bits"] for row in run.rows("likelihood") if row["objective"] == objective) / len(test)
