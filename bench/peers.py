"""Who competes: our backends, plain PyTorch, torch.compile of it, KeOps, attention, scikit-learn.

`function(op, who)` has the signature (queries, centres, sigma2) -> Tensor, all in `[groups, points, dimensions]`; ops
with a chain take `noise=` too.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fluxkernels as fk
from bench import published
from bench.cases import STEPS, TAU, Case

Function = Callable[..., Tensor]
MEAN, SCORE, LOG_DENSITY = "kde_mean", "kde_score", "kde_log_density"
STEP, CHAIN, RESIDUAL = "langevin_step", "langevin_chain", "residual_gradient"
WEIGHTS, TRANSITION = "transition_weights", "transition_average"
PASS = "flux_pass + transition_average"
OPS = (SCORE, MEAN, LOG_DENSITY, STEP, CHAIN, WEIGHTS, TRANSITION, RESIDUAL, PASS)
BACKWARD = ", forward and backward"
DIFFERENTIATED = tuple(op + BACKWARD for op in OPS)
NOISES = {STEP: 1, CHAIN: STEPS, PASS: 1 + STEPS}  # standard normals that an op takes for a number of its result

# On a machine with a GPU triton is there too, and takes no tensors of a CPU.
BACKENDS = [name for name, b in fk.backends().items() if b.available and (not b.devices or "cpu" in b.devices)]
PUBLISHED, COMPILED, KEOPS, ATTENTION, SKLEARN = "published", "compiled", "keops", "attention", "sklearn"
WHOLE = "whole"  # the published formula on all queries at once
PEERS = {
    **{op: [PUBLISHED] for op in (*OPS, *DIFFERENTIATED)},
    RESIDUAL + BACKWARD: [],  # as published it would be a third derivative of the density estimate
    SCORE: [PUBLISHED, COMPILED, KEOPS, ATTENTION],
    SCORE + BACKWARD: [PUBLISHED, KEOPS, ATTENTION],
    LOG_DENSITY: [PUBLISHED, SKLEARN],
    PASS: [PUBLISHED, COMPILED],
}
# Plain PyTorch takes more queries of one group than this in chunks: whole, the three matrices of 32768² numbers that it
# holds at once are 13 GB, and it is slower still: most of its time goes into fresh pages of memory.
ROWS = 4096
# Of a group, on which an answer is judged: the truth is slow.
JUDGED_PAIRS = 2**25
_MODULES = {KEOPS: "pykeops", SKLEARN: "sklearn"}


def missing(who: str) -> str | None:
    """Why a peer cannot run here, or None."""
    module = _MODULES.get(who)
    if module is None or importlib.util.find_spec(module):
        return None
    return f"{module} is not installed: pip install 'fluxkernels[bench]'"


def tolerance(op: str, who: str, dtype: torch.dtype = torch.float32) -> float:
    """Relative error above which an answer is wrong and its time means nothing."""
    if dtype in (torch.bfloat16, torch.float16) or who not in fk.backends():
        return 1e-2  # of half precision: one rounding of the result
    # Gradients through x_τ, which is rounded to float32 between two ops: at σ² = 0.001 the next one magnifies that.
    return 1e-4 if op == PASS + BACKWARD else 1e-5


def our_pass(
    x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    step = fk.flux_pass(x, refs, sigma2, TAU, steps=STEPS, noise=noise, backend=backend)
    return step.transition_average(step.score_t)


def _our_step(
    x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    given: dict[str, Any] = {"seed": 0} if noise is None else {"noise": noise[0]}
    return fk.langevin_step(x, refs, sigma2, TAU / STEPS, backend=backend, **given)


def _our_chain(
    x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    seed = 0 if noise is None else None
    return fk.langevin_chain(x, refs, sigma2, TAU, steps=STEPS, noise=noise, seed=seed, backend=backend)


def _ends(x: Tensor) -> Tensor:
    """Stands for the ends of chains: of the points' own spread, each near another point's mean."""
    return 0.9 * x.flip(1)


def _our_weights(x: Tensor, refs: Tensor, sigma2: float, *, backend: str | None = None) -> Tensor:
    return fk.transition_weights(x, _ends(x), refs, sigma2, TAU, backend=backend)


def _our_transition(x: Tensor, refs: Tensor, sigma2: float, *, backend: str | None = None) -> Tensor:
    return fk.transition_average(x, _ends(x), x, refs, sigma2, TAU, backend=backend)


def _our_residual(x: Tensor, refs: Tensor, sigma2: float, *, backend: str | None = None) -> Tensor:
    return fk.residual_gradient(x, -x, refs, sigma2, backend=backend)


def _in_chunks(function: Function) -> Function:
    """`function`, for at most ROWS queries of a group at once."""

    def chunked(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
        return torch.cat([function(queries, refs, sigma2) for queries in x.split(ROWS, 1)], 1)

    return chunked


published_score = _in_chunks(published.kde_score)
published_log_density = _in_chunks(published.kde_log_density)
_published_residual = _in_chunks(lambda x, refs, sigma2: published.residual_gradient(x, -x.detach(), refs, sigma2))


def _noise(x: Tensor, noise: Tensor | None, count: int) -> Tensor:
    return torch.randn(count, *x.shape, dtype=x.dtype, device=x.device) if noise is None else noise


def _published_chain(
    x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None, *, steps: int = STEPS
) -> Tensor:
    noise = _noise(x, noise, steps)
    parts = zip(x.split(ROWS, 1), noise.split(ROWS, 2), strict=True)
    tau = TAU * steps / STEPS
    return torch.cat([published.langevin_chain(start, refs, sigma2, tau, xi) for start, xi in parts], 1)


def _transition(mean: Tensor, sigma2: float, ends_and_values: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over ends, some at a time, of weights times values: Eq. 52 and 9."""
    variance = sigma2 * (1 - math.exp(-2 * TAU))
    average = torch.zeros_like(mean)
    for xt, values in ends_and_values:
        average += (-published.squared_distances(mean, xt) / (2 * variance)).softmax(1) @ values
    return average


def _published_weights(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    return published.transition_weights(x, _ends(x), refs, sigma2, TAU)


def _published_transition(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    mean = x + (1 - math.exp(-TAU)) * sigma2 * published_score(x, refs, sigma2)
    parts = list(zip(_ends(x).split(ROWS, 1), x.split(ROWS, 1), strict=True))
    return _transition(mean, sigma2, parts)


def published_pass(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None) -> Tensor:
    """The same from the formulas; s(x0), which the transition needs, is taken once."""
    noise = _noise(x, noise, 1 + STEPS)
    x0 = x + math.sqrt(sigma2) * noise[0]
    mean = x0 + (1 - math.exp(-TAU)) * sigma2 * published_score(x0, refs, sigma2)
    parts = []
    for start, xi in zip(x0.split(ROWS, 1), noise[1:].split(ROWS, 2), strict=True):
        xt = published.langevin_chain(start, refs, sigma2, TAU, xi)
        parts.append((xt, published.kde_score(xt, refs, sigma2)))
    return _transition(mean, sigma2, parts)


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


def attention_score(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    """Attention with keys and values = centres: x·r_j/σ², less |r_j|²/2σ², are the logits but for a constant."""
    bias = -refs.square().sum(-1).unsqueeze(-2) / (2 * sigma2)
    mean = torch.nn.functional.scaled_dot_product_attention(x, refs, refs, attn_mask=bias, scale=1 / sigma2)
    return (mean - x) / sigma2


def sklearn_log_density(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    from sklearn.neighbors import KernelDensity

    estimates = [
        KernelDensity(kernel="gaussian", bandwidth=math.sqrt(sigma2)).fit(r.numpy()).score_samples(z.numpy())
        for z, r in zip(x, refs, strict=True)
    ]
    return torch.stack([torch.from_numpy(estimate) for estimate in estimates])


@cache
def _compiled(op: str) -> Function:
    # One graph for each shape, as for our kernels.
    return torch.compile({SCORE: published_score, PASS: published_pass}[op], dynamic=False)


def _differentiated(function: Function) -> Function:
    """Gradients of Σ f(x) g(x) in queries and centres, joined; g stands for what training would send back."""

    def gradients(x: Tensor, refs: Tensor, sigma2: float, **noise: Tensor) -> Tensor:
        queries, centres = (points.detach().clone().requires_grad_() for points in (x, refs))
        found = function(queries, centres, sigma2, **noise)
        # The log-density is a number a point; weights get a number a start.
        cotangent = x if found.shape == x.shape else x[..., 0] if found.ndim < x.ndim else x[..., :1]
        return torch.cat(torch.autograd.grad((found * cotangent).sum(), (queries, centres)), 1)

    return gradients


_OURS: dict[str, Function] = {
    MEAN: fk.kde_mean,
    SCORE: fk.kde_score,
    LOG_DENSITY: fk.kde_log_density,
    STEP: _our_step,
    CHAIN: _our_chain,
    WEIGHTS: _our_weights,
    TRANSITION: _our_transition,
    RESIDUAL: _our_residual,
    PASS: our_pass,
}
_THEIRS: dict[tuple[str, str], Function] = {
    (MEAN, PUBLISHED): _in_chunks(published.kde_mean),
    (SCORE, PUBLISHED): published_score,
    (LOG_DENSITY, PUBLISHED): published_log_density,
    (STEP, PUBLISHED): partial(_published_chain, steps=1),
    (CHAIN, PUBLISHED): _published_chain,
    (WEIGHTS, PUBLISHED): _published_weights,
    (TRANSITION, PUBLISHED): _published_transition,
    (RESIDUAL, PUBLISHED): _published_residual,
    (PASS, PUBLISHED): published_pass,
    (SCORE, WHOLE): published.kde_score,
    (SCORE, KEOPS): keops_score,
    (SCORE, ATTENTION): attention_score,
    (LOG_DENSITY, SKLEARN): sklearn_log_density,
}


def function(op: str, who: str) -> Function:
    """What `who` computes for `op`; "… forward and backward" for gradients."""
    if op.endswith(BACKWARD):
        return _differentiated(function(op.removesuffix(BACKWARD), who))
    if who in BACKENDS:
        return partial(_OURS[op], backend=who)
    return _compiled(op) if who == COMPILED else _THEIRS[op, who]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(x: Tensor, refs: Tensor) -> tuple[Tensor, Tensor]:
    """The first groups and queries, with all of their centres: what an answer is judged on."""
    queries = max(16, min(512, JUDGED_PAIRS // refs.shape[1]))
    return x[:4, :queries].contiguous(), refs[:4].contiguous()


def relative_error(op: str, who: str, case: Case, dtype: torch.dtype = torch.float32) -> float:
    """In the Euclidean norm, against our torch backend in float64 on the same inputs and noise.

    On the first groups and queries only, with all of their centres.
    """
    x, refs = judged(*(points.to(dtype) for points in case.inputs()))
    given: dict[str, Any] = {}
    if count := NOISES.get(op.removesuffix(BACKWARD)):
        given["noise"] = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = function(op, who)(x, refs, case.sigma2, **given)
    exact = {name: noise.double() for name, noise in given.items()}
    truth = function(op, "torch")(x.double(), refs.double(), case.sigma2, **exact)
    return float((result.double() - truth).norm() / truth.norm())
