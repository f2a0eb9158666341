"""Implementations that the benchmarks compare: our backends, plain PyTorch, torch.compile of it, and other libraries.

`function(task, implementation)` has the signature (queries, refs, sigma2) -> Tensor, with tensors of shape
`[groups, points, dimensions]`; tasks with a chain take `noise=` too.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fluxkernels as fk
from bench.tasks import LOG_DENSITY, ONE_ROUNDING, PASS, RESIDUAL, SCORE, Task, inputs_of, noise_of
from bench.workloads import TAU, Workload
from tests.support import published
from tests.support.ops import NUM_STEPS, Op
from tests.support.ops import judged as judged_of

Function = Callable[..., Tensor]

# On a machine with a GPU triton is there too, and takes no tensors of a CPU.
BACKENDS = [name for name, b in fk.backends().items() if b.available and (not b.devices or "cpu" in b.devices)]
PUBLISHED, COMPILED, KEOPS, ATTENTION, SKLEARN = "published", "compiled", "keops", "attention", "sklearn"
WHOLE = "whole"  # the published formula on all queries at once
# Beside plain PyTorch, which has every task but one.
OTHERS = {
    SCORE.name: (COMPILED, KEOPS, ATTENTION),
    SCORE.with_gradient().name: (KEOPS, ATTENTION),
    LOG_DENSITY.name: (SKLEARN,),
    PASS.name: (COMPILED,),
}
# Plain PyTorch takes more queries of one group than this in chunks: whole, the three matrices of 32768² numbers that it
# materializes at once are 13 GB, and it is slower still: most of its time goes into fresh pages of memory.
ROWS = 4096
# Of a group, on which an answer is judged: the truth is slow.
JUDGED_PAIRS = 2**25
# With neither noise nor seed, torch's generator draws: the `torch` backend does so faster than from a seed.
SEEDED = ("langevin_step", "langevin_chain")
_MODULES = {KEOPS: "pykeops", SKLEARN: "sklearn"}


def baselines_of(task: Task) -> list[str]:
    """Implementations beside our backends."""
    # As published the residual's gradient would be a third derivative of the density estimate.
    plain = [] if task == RESIDUAL.with_gradient() else [PUBLISHED]
    return [*plain, *OTHERS.get(task.name, ())]


def missing(implementation: str) -> str | None:
    """Why an implementation cannot run here, or None."""
    module = _MODULES.get(implementation)
    if module is None or importlib.util.find_spec(module):
        return None
    return f"{module} is not installed: pip install 'fluxkernels[bench]'"


def tolerance(task: Task, implementation: str, dtype: torch.dtype = torch.float32) -> float:
    """Relative error above which an answer is wrong and its time means nothing."""
    return task.tolerance(dtype) if implementation in fk.backends() else ONE_ROUNDING


def ours(op: Op, backend: str) -> Function:
    """The op on one of our backends; of several tensors the one that is judged."""

    def call(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None) -> Tensor:
        inputs = inputs_of(x, refs, sigma2)
        options: dict[str, Any] = {"backend": backend}
        if noise is not None:
            inputs |= noise_of(op, noise)
        elif op.noise:
            options["seed"] = 0 if op.name in SEEDED else None
        return judged_of(op, op.call(inputs, **options))

    return call


def plain(op: Op) -> Function:
    """The op as published, for at most ROWS queries of a group at once, unless ends of chains make that impossible."""
    if op.name in _IN_PARTS:
        return _IN_PARTS[op.name]
    formula = op.published
    assert formula is not None

    def on(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None) -> Tensor:
        inputs = inputs_of(x, refs, sigma2) | ({} if noise is None else noise_of(op, noise))
        return formula(*op.values(inputs))

    def call(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None) -> Tensor:
        noise = drawn(x, noise, op.draws())
        if "xt" in op.arguments.values():
            return on(x, refs, sigma2, noise)
        queries = x.split(ROWS, 1)
        noises = [None] * len(queries) if noise is None else noise.split(ROWS, 2)
        return torch.cat([on(z, refs, sigma2, xi) for z, xi in zip(queries, noises, strict=True)], 1)

    return call


def drawn(x: Tensor, noise: Tensor | None, count: int) -> Tensor | None:
    """The noise given, or that many standard normal draws of the shape of x."""
    if noise is not None or not count:
        return noise
    return torch.randn(count, *x.shape, dtype=x.dtype, device=x.device)


def _averaged(mean: Tensor, sigma2: float, ends_and_values: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over ends, some at a time, of weights times values: Eq. 52 and 9."""
    variance = sigma2 * (1 - math.exp(-2 * TAU))
    average = torch.zeros_like(mean)
    for xt, values in ends_and_values:
        average += (-published.squared_distances(mean, xt) / (2 * variance)).softmax(1) @ values
    return average


def _published_average(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    mean = x + (1 - math.exp(-TAU)) * sigma2 * plain(SCORE.op)(x, refs, sigma2)
    xt = inputs_of(x, refs, sigma2)["xt"]
    return _averaged(mean, sigma2, list(zip(xt.split(ROWS, 1), x.split(ROWS, 1), strict=True)))


def published_pass(x: Tensor, refs: Tensor, sigma2: float, noise: Tensor | None = None) -> Tensor:
    """The pass from the formulas; s(x0), which the transition needs, is taken once."""
    noise = drawn(x, noise, 1 + NUM_STEPS)
    assert noise is not None
    x0 = x + math.sqrt(sigma2) * noise[0]
    mean = x0 + (1 - math.exp(-TAU)) * sigma2 * plain(SCORE.op)(x0, refs, sigma2)
    parts = []
    for start, xi in zip(x0.split(ROWS, 1), noise[1:].split(ROWS, 2), strict=True):
        xt = published.langevin_chain(start, refs, sigma2, TAU, xi)
        parts.append((xt, published.kde_score(xt, refs, sigma2)))
    return _averaged(mean, sigma2, parts)


_IN_PARTS: dict[str, Function] = {"transition_average": _published_average, "flux_pass": published_pass}


def keops_score(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    # Without these flags KeOps compiles for any processor; with this one's instructions it is 2 to 4 times as fast.
    # They are read when it is imported, and nothing else may see them.
    with mock.patch.dict(os.environ, CXXFLAGS="-march=native -ffast-math"):
        from pykeops.torch import LazyTensor
    if x.shape[0] == 1:
        return keops_score(x[0], refs[0], sigma2).unsqueeze(0)  # without a batch dimension it runs simpler code
    query, ref = LazyTensor(x.unsqueeze(-2)), LazyTensor(refs.unsqueeze(-3))
    logits = -((query - ref) ** 2).sum(-1) / (2 * sigma2)
    mean: Tensor = logits.sumsoftmaxweight(ref, dim=x.dim() - 1)
    return (mean - x) / sigma2


def attention_score(x: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    """Attention with keys and values = refs: x·r_j/σ², less |r_j|²/2σ², are the logits but for a constant."""
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


_OTHER_FUNCTIONS: dict[tuple[str, str], Function] = {
    (SCORE.name, WHOLE): published.kde_score,
    (SCORE.name, KEOPS): keops_score,
    (SCORE.name, ATTENTION): attention_score,
    (LOG_DENSITY.name, SKLEARN): sklearn_log_density,
}


@cache
def _compiled(op: Op) -> Function:
    # One graph for each shape, as for our kernels.
    return torch.compile(plain(op), dynamic=False)


def _differentiated(function: Function) -> Function:
    """Gradients of Σ f(x) g(x) in queries and reference points, joined; g stands for the cotangent of a training."""

    def gradients(x: Tensor, refs: Tensor, sigma2: float, **noise: Tensor) -> Tensor:
        leaves = tuple(points.detach().clone().requires_grad_() for points in (x, refs))
        found = function(*leaves, sigma2, **noise)
        # The log-density is one number per point; weights get one number per start.
        cotangent = x if found.shape == x.shape else x[..., 0] if found.ndim < x.ndim else x[..., :1]
        return torch.cat(torch.autograd.grad((found * cotangent).sum(), leaves), 1)

    return gradients


def function(task: Task, implementation: str) -> Function:
    """The task as that implementation computes it."""
    if task.backward:
        return _differentiated(function(Task(task.op), implementation))
    if implementation in BACKENDS:
        return ours(task.op, implementation)
    if implementation == COMPILED:
        return _compiled(task.op)
    return plain(task.op) if implementation == PUBLISHED else _OTHER_FUNCTIONS[task.name, implementation]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(x: Tensor, refs: Tensor) -> tuple[Tensor, Tensor]:
    """The first groups and queries, with all of their reference points: on them an answer is judged."""
    queries = max(16, min(512, JUDGED_PAIRS // refs.shape[1]))
    return x[:4, :queries].contiguous(), refs[:4].contiguous()


def relative_error(task: Task, implementation: str, workload: Workload, dtype: torch.dtype = torch.float32) -> float:
    """Error in the Euclidean norm, against our torch backend in float64 on the same inputs and noise.

    On the first groups and queries only, with all of their reference points.
    """
    x, refs = judged(*(points.to(dtype) for points in workload.inputs()))
    given: dict[str, Any] = {}
    if count := task.op.draws():
        given["noise"] = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = function(task, implementation)(x, refs, workload.sigma2, **given)
    exact = {name: noise.double() for name, noise in given.items()}
    truth = function(task, "torch")(x.double(), refs.double(), workload.sigma2, **exact)
    return float((result.double() - truth).norm() / truth.norm())
