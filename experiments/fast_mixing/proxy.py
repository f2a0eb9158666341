"""The mixing proxy (Eq. 43, 44), as in the paper and as in the published program."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.common.run import Run
from experiments.fast_mixing.problem import noised
from fluxmatching import mixing_loss
from fluxmatching.fields import NoisyField

BATCH = 256
STEP_SIZE, EPSILON, ITERATIONS = 0.2, 0.05, 50


def log_proxies(run: Run, field: NoisyField, name: str, seed: int) -> None:
    """Log both proxies at every noise level (rows "proxy"), with the same draws for all fields of a seed."""
    done = {row["sigma"] for row in run.rows("proxy") if (row["field"], row["seed"]) == (name, seed)}
    for sigma in sorted({*run.config.proxy_sigmas, run.config.mixture_sigma} - done):
        draws = noised(0.0).sample(run.config.minibatches * BATCH, run.generator("ratio", seed)).to(run.device)
        minibatches = draws.unflatten(0, (-1, BATCH))
        with torch.no_grad():
            # The loss repeats a minibatch's one number for every sample of it.
            ours = [mixing_loss(field, x, sigma, seed=k)[0].item() for k, x in enumerate(minibatches)]
            published = published_ratios(field, minibatches, sigma, run.device_generator("published", seed))
        run.log(
            kind="proxy", field=name, seed=seed, sigma=sigma,
            ours=sum(ours) / len(ours), published=published.mean(),
        )  # fmt: skip


def published_ratios(field: NoisyField, x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Compute the proxy of the published program for minibatches x `[B, N, D]`, one number per minibatch.

    It differs from `fluxmatching.mixing_loss` in the drift, which is σ f, and in the Sinkhorn divergence, whose cost
    is |x - y|² and whose 50 iterations all are at the final temperature.
    """
    half = x.shape[1] // 2
    noise = [torch.randn(shape, generator=generator, device=x.device) for shape in (x.shape, *2 * [x[:, :half].shape])]
    start = x + sigma * noise[0]
    reference, off = start[:, :half], start[:, half : 2 * half] + sigma * noise[1]
    h, level = STEP_SIZE * sigma**2, torch.tensor(sigma, device=x.device)
    drift = sigma * field(off.flatten(0, 1), level).unflatten(0, off.shape[:2])
    mixed = off + h * drift + math.sqrt(2 * h) * noise[2]
    return plain_divergence(mixed, reference) / plain_divergence(off, reference)


def plain_divergence(x: Tensor, y: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """Compute the Sinkhorn divergence for the cost |x - y|² by iterations at ε alone, `[B]` for x, y `[B, n, D]`."""

    def cost(a: Tensor, b: Tensor) -> Tensor:
        return transport_cost(torch.cdist(a, b).square(), epsilon, iterations)

    return cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2


def transport_cost(costs: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute Σ π C for the plan π that Sinkhorn's iterations find from equal weights, `[B]` for C `[B, n, m]`."""
    n, m = costs.shape[1:]
    kernel = -costs / epsilon
    g = costs.new_zeros(costs.shape[0], m)
    for _ in range(iterations):
        f = -math.log(n) - (kernel + g[:, None]).logsumexp(2)
        g = -math.log(m) - (kernel + f[:, :, None]).logsumexp(1)
    return ((kernel + f[:, :, None] + g[:, None]).exp() * costs).sum((1, 2))
