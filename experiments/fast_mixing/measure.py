"""Measurements of a field of the mixture: samples in few steps, proxies, mixing, and whether it preserves p_σ."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.common.autocorrelation import integrated_autocorrelation_time
from experiments.common.distances import projected_quantiles, sliced_difference, wasserstein2
from experiments.common.run import Run
from experiments.fast_mixing.problem import KNOWN, SIGMA_MAX, SIGMA_MIN, SIGMA_RANGE, noised
from experiments.fast_mixing.proxy import log_proxies
from experiments.fast_mixing.steps import FIXED_ON_MIXTURE, GRID, TUNED, Steps, tune
from fluxmatching import unadjusted_langevin
from fluxmatching.fields import NoisyField

ANGLES = torch.arange(16) * torch.pi / 16
DIRECTIONS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1).double()
TRUTH = 200_000  # exact samples with which all others are compared
KEPT = 8  # steps of the grid that are judged again


def measure(run: Run, field: NoisyField, name: str, seed: int) -> None:
    """Log rows "steps" and "proxy", then one row "mixture": mixing and bias at `mixture_sigma`."""
    sigma = run.config.mixture_sigma
    log_steps(run, field, name, seed)
    log_proxies(run, field, name, seed)
    level = torch.tensor(sigma, device=run.device)
    time, end = chains(run, lambda z: field(z, level), seed)
    exact = noised(sigma).sample(len(end), run.generator("stationary", seed))
    bias = wasserstein2(end, exact) if end.isfinite().all() else math.inf
    run.log(kind="mixture", field=name, seed=seed, time=time, bias=bias)


def log_steps(run: Run, field: NoisyField, name: str, seed: int) -> None:
    """Log the distance of samples to exact ones by number of steps and procedure (rows "steps").

    Samples are judged with other noise than the one with which steps are tuned.
    """
    config = run.config
    rows = [row for row in run.rows("steps") if (row["field"], row["seed"]) == (name, seed)]
    done = {(row["procedure"], row["steps"]) for row in rows}
    wanted = [(procedure, k) for procedure in FIXED_ON_MIXTURE for k in config.mixture_steps]
    wanted += [(TUNED, k) for k in config.tuned_steps]
    for procedure, num_steps in wanted:
        if (procedure, num_steps) in done:
            continue
        steps = tuned(run, field, name, num_steps, seed) if procedure == TUNED else FIXED_ON_MIXTURE[procedure]
        distance = judge(run, field, num_steps, steps, sample_count(config, name), "start", seed)
        run.log(
            kind="steps", field=name, seed=seed, procedure=procedure, steps=num_steps, distance=distance,
            ratio=steps.ratio, scale=steps.scale, spacing=steps.spacing,
        )  # fmt: skip


def sample_count(config: Any, name: str) -> int:
    """Return the number of samples that judge a field; a known one is cheap to evaluate."""
    return config.exact_samples if name in KNOWN else config.mixture_samples


def tuned(run: Run, field: NoisyField, name: str, num_steps: int, seed: int) -> Steps:
    """Return the steps of the grid whose samples are nearest to exact ones."""
    config, count = run.config, sample_count(run.config, name)

    def distance(steps: Steps, count: int) -> float:
        return judge(run, field, num_steps, steps, count, "tuning", seed)

    return tune(distance, GRID[:: config.thinning], count // 10, count // 2, KEPT)


def judge(run: Run, field: NoisyField, num_steps: int, steps: Steps, count: int, what: str, seed: int) -> float:
    """Return the distance of samples to exact ones, from the same noise for all fields; nan if they diverged."""
    generator = run.generator(what, seed, num_steps, count)
    start = (SIGMA_MAX * torch.randn(count, 2, generator=generator)).to(run.device)
    found = steps.sample(field, start, num_steps, SIGMA_RANGE, run.device_generator(f"{what} noise", seed, num_steps))
    return distance_to_data(found, 0.0 if steps.denoise else SIGMA_MIN)


def distance_to_data(found: Tensor, sigma: float) -> float:
    """Return the sliced W2 between samples and p_σ; nan if they are not finite."""
    if not found.isfinite().all():
        return math.nan
    return sliced_difference(projected_quantiles(found.cpu(), DIRECTIONS), exact_quantiles(sigma), 2)


@functools.cache
def exact_quantiles(sigma: float) -> Tensor:
    """Return the quantiles of p_σ along the directions, from many samples."""
    return projected_quantiles(noised(sigma).sample(TRUTH, torch.Generator().manual_seed(0)), DIRECTIONS)


def chains(run: Run, field: Callable[[Tensor], Tensor], seed: int) -> tuple[float, Tensor]:
    """Run Langevin chains from exact samples at `mixture_sigma`; returns the autocorrelation time (σ²) and their ends.

    The time is the larger of the two coordinates' times; infinite if the chains are too short to measure it.
    """
    config = run.config
    sigma, step_size = config.mixture_sigma, config.langevin_step_size * config.mixture_sigma**2
    start = noised(sigma).sample(config.chains, run.generator("chains", seed)).to(run.device)
    path: list[Tensor] = []
    noise = run.device_generator("chain noise", seed)
    end = unadjusted_langevin(
        field,
        start,
        step_size=step_size,
        num_steps=config.chain_steps,
        generator=noise,
        callback=lambda _, x: path.append(x.cpu()),
    )
    states = torch.stack(path)
    try:
        times = [integrated_autocorrelation_time(states[..., d]) for d in range(2)]
    except ValueError:  # the chains are too short to measure it
        return math.inf, end.cpu()
    return max(times) * config.langevin_step_size, end.cpu()
