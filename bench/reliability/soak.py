"""Training steps and every op with changing shapes for minutes in one process, whose memory must not grow."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import fluxkernels as fk
from bench.timing import resident
from fluxmatching import FluxOptions, UniformHorizon, flux_matching_loss
from tests.support.ops import OPS, tensors

WARM_UP = 60.0  # seconds in which caches and the allocator fill
INTERVAL = 10.0  # seconds between two looks at the memory
LEAST_SAMPLES = 6
MOST_GROWTH = 20.0  # MB
# Matrices of more points would be allocated and freed by tens of MB, and hide a leak.
MOST_POINTS = 128
WHAT = "training steps and every op, forward and backward, with changing shapes in one process"


def growth(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Growth of samples (seconds, bytes) in MB: median of the last third less that of the first; trend per hour."""
    third = max(1, len(samples) // 3)
    megabytes = [size / 1e6 for _, size in samples]
    grown = statistics.median(megabytes[-third:]) - statistics.median(megabytes[:third])
    return grown, float(np.polyfit([seconds / 3600 for seconds, _ in samples], megabytes, 1)[0])


def leaks(samples: Sequence[tuple[float, float]]) -> bool:
    return not growth(samples)[0] < MOST_GROWTH


def call_every_op(rng: random.Random, backend: str) -> None:
    """Call each op forward and backward, on groups of random sizes, in float32 or float64."""
    groups, queries, points = rng.randint(1, 4), rng.randint(1, MOST_POINTS), rng.randint(1, MOST_POINTS)
    dimensions = rng.randint(1, 40)
    dtype = rng.choice([torch.float32, torch.float64])
    x = torch.randn(groups, queries, dimensions, dtype=dtype, requires_grad=True)
    refs = torch.randn(groups, points, dimensions, dtype=dtype, requires_grad=True)
    sigma2, tau, seed = 0.1 * dimensions, rng.uniform(0, 4), rng.randrange(2**62)
    with fk.use_backend(backend):
        step = fk.flux_pass(x, refs, sigma2, tau, seed=seed)
        inputs = {
            "x": x,
            "refs": refs,
            "per_query": sigma2,
            "per_group": sigma2,
            "tau": tau,
            "h": 0.3,
            "xt": step.xt,
            "values": step.score_t,
            "field": torch.sin(x),
        }
        results = [result for op in OPS for result in tensors(op.call(inputs, **({"seed": seed} if op.noise else {})))]
        torch.stack([result.sum() for result in results]).sum().backward()


class Training:
    """A small field and its optimizer; each step has a minibatch of another size and other options of the loss."""

    def __init__(self) -> None:
        self.field = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2))
        self.optimizer = torch.optim.Adam(self.field.parameters(), lr=1e-3)

    def step(self, rng: random.Random, backend: str) -> None:
        x, sigma2 = torch.randn(rng.randint(2, MOST_POINTS), 2), rng.uniform(0.05, 1)
        options = FluxOptions(
            horizon=UniformHorizon(),
            estimator=rng.choice(["cross_chain", "single_chain"]),
            second_derivatives=rng.choice(["finite_difference", "double_backward"]),
            backend=backend,
        )
        loss = flux_matching_loss(self.field, x, math.sqrt(sigma2), options).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def sampled(seconds: float, warm_up: float, interval: float) -> tuple[int, list[tuple[float, float]]]:
    """Steps made in that time, and (seconds, resident bytes) after the warm-up."""
    rng, training = random.Random(0), Training()
    backends = [b.name for b in fk.backends().values() if b.available and (not b.devices or "cpu" in b.devices)]
    samples: list[tuple[float, float]] = []
    steps, begin, due = 0, time.perf_counter(), warm_up
    with tqdm(total=round(seconds), bar_format="{l_bar}{bar}| {n} of {total} s{postfix}", mininterval=1) as bar:
        while (now := time.perf_counter() - begin) < seconds:
            backend = rng.choice(backends)
            call_every_op(rng, backend)
            training.step(rng, backend)
            steps += 1
            bar.update(int(now) - bar.n)
            if now >= due:
                samples.append((now, resident("VmRSS")))
                due += interval
                bar.set_postfix(steps=steps, memory=f"{samples[-1][1] / 1e6:.0f} MB")
    return steps, samples


def check(minutes: float, warm_up: float = WARM_UP) -> dict[str, Any]:
    """Raises ValueError where no time is left after the warm-up."""
    try:
        resident("VmRSS")
    except OSError:
        return {"skipped": "the resident set is read from /proc, which is not here"}
    left = 60 * minutes - warm_up
    if not left > 0:
        raise ValueError(f"soak: minutes must be more than the {warm_up / 60:g} of its warm-up, got {minutes:g}")
    steps, samples = sampled(60 * minutes, warm_up, min(INTERVAL, left / LEAST_SAMPLES))
    grown, slope = growth(samples)
    return {
        "passed": not leaks(samples),
        "minutes": minutes,
        "steps": steps,
        "grown_mb": grown,
        "slope_mb_per_hour": slope,
        "samples": [[round(seconds), round(size / 1e6, 1)] for seconds, size in samples],
    }


def describe(entry: dict[str, Any]) -> str:
    return (
        f"{entry['steps']} steps in {entry['minutes']:g} min: resident set {entry['grown_mb']:+.1f} MB "
        f"(trend {entry['slope_mb_per_hour']:+.0f} MB per hour)"
    )
