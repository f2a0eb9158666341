"""Score, log-density and the pass of a training step: our backends beside the published formulas.

pytest bench --benchmark-only
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fluxkernels as fk
from bench import published

BACKENDS = [name for name, backend in fk.backends().items() if backend.available]
# groups, queries, centres, dimensions
SHAPES = {
    "toy": (1, 256, 256, 2),
    "genes": (200, 256, 256, 2),
    "one group": (1, 4096, 4096, 2),
    "springs": (1, 256, 256, 200),
    "images": (1, 128, 128, 3072),
}


def inputs(shape: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    G, N, M, D = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(G, N, D, generator=generator)
    refs = x if N == M else torch.randn(G, M, D, generator=generator)
    return x, refs, 0.1 * D


def published_pass(x: torch.Tensor, refs: torch.Tensor, sigma2: float, tau: float) -> torch.Tensor:
    x0 = x + sigma2**0.5 * torch.randn_like(x)
    xt = published.langevin_chain(x0, refs, sigma2, tau, torch.randn(4, *x.shape))
    published.kde_score(x0, refs, sigma2)
    score = published.kde_score(xt, refs, sigma2)
    return published.transition_weights(x0, xt, refs, sigma2, tau) @ score


def our_pass(x: torch.Tensor, refs: torch.Tensor, sigma2: float, tau: float) -> torch.Tensor:
    p = fk.flux_pass(x, refs, sigma2, tau)
    return p.transition_average(p.score_t)


CALLS: dict[str, dict[str, Callable[..., Any]]] = {
    "kde_score": {"ours": fk.kde_score, "published": published.kde_score},
    "kde_log_density": {"ours": fk.kde_log_density, "published": published.kde_log_density},
    "flux_pass": {
        "ours": lambda x, refs, s2: our_pass(x, refs, s2, 1.0),
        "published": lambda x, refs, s2: published_pass(x, refs, s2, 1.0),
    },
}


@pytest.mark.parametrize("who", [*BACKENDS, "published"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_speed(benchmark: Any, call: str, shape: str, who: str) -> None:
    x, refs, sigma2 = inputs(shape)
    benchmark.group = f"{call}, {shape} {SHAPES[shape]}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if who == "published":
        benchmark(CALLS[call]["published"], x, refs, sigma2)
    else:
        with fk.use_backend(who):
            benchmark(CALLS[call]["ours"], x, refs, sigma2)
