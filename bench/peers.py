"""Who competes: our backends, plain PyTorch, KeOps and scikit-learn, each as a function of the same arguments.

`functions(op, who)` has the signature (queries, centres, sigma2) -> Tensor; that of the pass takes `noise=` too.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fluxkernels as fk
from bench import published
from bench.cases import STEPS, TAU

PASS, SCORE, LOG_DENSITY = OPS = ("flux_pass + transition_average", "kde_score", "kde_log_density")
BACKENDS = [name for name, backend in fk.backends().items() if backend.available]
PEERS = {PASS: ["published"], SCORE: ["published", "keops"], LOG_DENSITY: ["published", "sklearn"]}
# Plain PyTorch takes more queries of one group than this in chunks: 32768² numbers are 4.3 GB, and it holds three such
# matrices at once. Whole, it is slower still: most of its time goes into fresh pages of memory.
ROWS = 4096
# Relative errors above which an answer is wrong and its time means nothing.
TOLERANCES = {"ours": 1e-5, "theirs": 1e-2}
_MODULES = {"keops": "pykeops", "sklearn": "sklearn"}


def missing(who: str) -> str | None:
    """Why a peer cannot run here, or None."""
    module = _MODULES.get(who)
    if module is None or importlib.util.find_spec(module):
        return None
    return f"{module} is not installed: pip install 'fluxkernels[bench]'"


def tolerance(who: str) -> float:
    return TOLERANCES["ours" if who in fk.backends() else "theirs"]


def dtype(op: str, who: str) -> torch.dtype:
    """scikit-learn computes in float64 alone; against it our log-density takes and returns float64 as well."""
    return torch.float64 if op == LOG_DENSITY and who != "published" else torch.float32


def our_pass(
    x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    step = fk.flux_pass(x, refs, sigma2, TAU, steps=STEPS, noise=noise, backend=backend)
    return step.transition_average(step.score_t)


def _in_chunks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, for at most ROWS queries of a group at once."""

    def chunked(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
        return torch.cat([function(queries, refs, sigma2) for queries in x.split(ROWS, 1)], 1)

    return chunked


published_score = _in_chunks(published.kde_score)
published_log_density = _in_chunks(published.kde_log_density)


def published_pass(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None) -> Tensor:
    """The same from the formulas; s(x0), which the transition needs, is taken once."""
    if noise is None:
        noise = torch.randn(1 + STEPS, *x.shape, device=x.device)
    x0 = x + math.sqrt(sigma2) * noise[0]
    mean = x0 + (1 - math.exp(-TAU)) * sigma2 * published_score(x0, refs, sigma2)
    variance = sigma2 * (1 - math.exp(-2 * TAU))
    average = torch.zeros_like(x)
    for start, xi in zip(x0.split(ROWS, 1), noise[1:].split(ROWS, 2), strict=True):
        xt = published.langevin_chain(start, refs, sigma2, TAU, xi)
        score = published.kde_score(xt, refs, sigma2)
        average += (-published.squared_distances(mean, xt) / (2 * variance)).softmax(1) @ score
    return average


def keops_score(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    # KeOps compiles for any processor unless told; with this one's instructions it is 2 to 4 times as fast. Its flags
    # are read when it is imported, and nothing else may see them.
    with mock.patch.dict(os.environ, CXXFLAGS="-march=native -ffast-math"):
        from pykeops.torch import LazyTensor
    if x.shape[0] == 1:
        return keops_score(x[0], refs[0], sigma2).unsqueeze(0)  # without a batch dimension it runs simpler code
    query, centre = LazyTensor(x.unsqueeze(-2)), LazyTensor(refs.unsqueeze(-3))
    logits = -((query - centre) ** 2).sum(-1) / (2 * sigma2)
    return (logits.sumsoftmaxweight(centre, dim=x.dim() - 1) - x) / sigma2


def sklearn_log_density(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    from sklearn.neighbors import KernelDensity

    estimates = [
        KernelDensity(kernel="gaussian", bandwidth=math.sqrt(sigma2)).fit(r.numpy()).score_samples(z.numpy())
        for z, r in zip(x, refs, strict=True)
    ]
    return torch.stack([torch.from_numpy(estimate) for estimate in estimates])


_OURS: dict[str, Callable[..., Tensor]] = {PASS: our_pass, SCORE: fk.kde_score, LOG_DENSITY: fk.kde_log_density}
_THEIRS: dict[tuple[str, str], Callable[..., Tensor]] = {
    (PASS, "published"): published_pass,
    (SCORE, "published"): published_score,
    (SCORE, "keops"): keops_score,
    (LOG_DENSITY, "published"): published_log_density,
    (LOG_DENSITY, "sklearn"): sklearn_log_density,
}


def function(op: str, who: str) -> Callable[..., Tensor]:
    return partial(_OURS[op], backend=who) if who in BACKENDS else _THEIRS[op, who]


def relative_error(op: str, who: str, x: Tensor, sigma2: float, result: Tensor) -> float:
    """Of `result` = function(op, who)(x, x, sigma2), in the Euclidean norm, against our torch backend in float64.

    On the first groups and queries only. The pass draws its own noise, so it runs once more there, with noise given.
    """
    queries, refs = x[:4, :512], x[:4]
    given: dict[str, Any] = {}
    if op == PASS:
        given["noise"] = torch.randn(1 + STEPS, *queries.shape, generator=torch.Generator().manual_seed(1))
        result = function(op, who)(queries, refs, sigma2, **given)
    exact = {name: noise.double() for name, noise in given.items()}
    truth = function(op, "torch")(queries.double(), refs.double(), sigma2, **exact)
    return float((result[:4, :512].double() - truth).norm() / truth.norm())
