"""Kernels for few dimensions: centres stream past queries, no matrix of pairs is ever stored.

They compute in float32, for float64 in float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxkernels.triton_kernels.launch import launch_streaming, on_device_of, wide
from fluxkernels.triton_kernels.streaming.kde import (
    kde_backward_queries_kernel,
    kde_backward_refs_kernel,
    kde_kernel,
)
from fluxkernels.triton_kernels.streaming.langevin import langevin_kernel
from fluxkernels.triton_kernels.streaming.residual import residual_kernel
from fluxkernels.triton_kernels.streaming.transition import transition_average_kernel, transition_ends_kernel

# Columns of values that a program of `transition_average` keeps in registers.
MOST_VALUES = 8


def kept(kernel: Any, D: int, width: int = 0) -> int:
    """Numbers that a kernel keeps for every row of its tiles, where it takes `width` columns of values at once."""
    return {
        "kde_kernel": D,
        "kde_backward_queries_kernel": max(8, 2 * D),
        "kde_backward_refs_kernel": 3 * D + 4,
        "residual_kernel": max(8, 2 * D),
        "langevin_kernel": 2 * D,
        "transition_ends_kernel": D,
        "transition_average_kernel": D + width + 2,
    }[kernel.__name__]


def _launch(
    kernel: Any,
    arguments: Sequence[Any],
    points: Tensor,
    queries: int,
    centres: int,
    more: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """`launch_streaming` with what the kernel keeps."""
    numbers = kept(kernel, points.shape[-1], constants.get("WIDTH", 0))
    launch_streaming(kernel, arguments, points, queries, centres, numbers, more, **constants)


def kde(z: Tensor, refs: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, M = z.shape[1], refs.shape[1]
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:-1])
    inputs = [part for t in (z, refs, sigma2) for part in (t, *t.stride())]
    with on_device_of(z):
        _launch(kde_kernel, [*inputs, shift, mean, log_density, N, M], z, N, M)
    return shift, mean, log_density


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), M = z.shape, refs.shape[1]
    g_z, g_refs, g_sigma2 = z.new_empty(z.shape), refs.new_empty(refs.shape), sigma2.new_empty(sigma2.shape)
    statistics = torch.empty((B, N, 2 + D), dtype=wide(z.dtype), device=z.device)
    inputs = [part for t in (z, refs, sigma2, g_shift, g_mean, g_log_density) for part in (t, *t.stride())]
    with on_device_of(z):
        _launch(kde_backward_queries_kernel, [*inputs, g_z, g_sigma2, statistics, N, M], z, N, M)
        _launch(kde_backward_refs_kernel, [*inputs, statistics, g_refs, N, M], z, M, N)
    return g_z, g_refs, g_sigma2


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor) -> Tensor:
    N, M = z.shape[1], refs.shape[1]
    gradient = z.new_empty(z.shape)
    inputs = [part for t in (z, field, refs, sigma2) for part in (t, *t.stride())]
    with on_device_of(z):
        _launch(residual_kernel, [*inputs, gradient, N, M], z, N, M)
    return gradient


def _langevin(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    results: Sequence[Tensor],
    whole_pass: bool,
) -> None:
    N, M = x.shape[1], refs.shape[1]
    inputs = [part for t in (x, refs, sigma2, tau) for part in (t, *t.stride())]
    # What is absent is never read; any tensor stands for it.
    random = [x if seed is None else seed, *((x, 0, 0, 0, 0) if noise is None else (noise, *noise.stride()))]
    with on_device_of(x):
        arguments = [*inputs, *random, *results, N, M, steps]
        _launch(langevin_kernel, arguments, x, N, M, PASS=whole_pass, SEEDED=noise is None)


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    xt = x0.new_empty(x0.shape)
    _langevin(x0, refs, sigma2, tau, steps, noise, seed, (xt, xt, xt, xt), False)
    return xt


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, shift0, xt, shift_t = (x.new_empty(x.shape) for _ in range(4))
    _langevin(x, refs, sigma2, tau, steps, noise, seed, (x0, shift0, xt, shift_t), True)
    return x0, shift0, xt, shift_t


def _ends(
    x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor, statistics: Tensor, weights: Tensor | None
) -> None:
    N, E = x0.shape[1], xt.shape[1]
    inputs = [part for t in (x0, shift0, xt, sigma2, tau) for part in (t, *t.stride())]
    results = [statistics, statistics if weights is None else weights]
    _launch(transition_ends_kernel, [*inputs, *results, N, E], x0, E, N, WEIGHTS=weights is not None)


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    with on_device_of(x0):
        _ends(x0, shift0, xt, sigma2, tau, weights, weights)
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    (B, N, _), (E, V) = x0.shape, values.shape[1:]
    average = values.new_empty((B, N, V))
    statistics = torch.empty((B, 2, E), dtype=wide(x0.dtype), device=x0.device)
    inputs = [part for t in (x0, shift0, xt, values, sigma2, tau) for part in (t, *t.stride())]
    width = min(V, MOST_VALUES)
    with on_device_of(x0):
        _ends(x0, shift0, xt, sigma2, tau, statistics, None)
        arguments = [*inputs, statistics, average, N, E, V]
        _launch(transition_average_kernel, arguments, x0, N, E, more=(-(-V // width),), WIDTH=width)
    return average


KERNELS = (
    kde_kernel,
    kde_backward_queries_kernel,
    kde_backward_refs_kernel,
    residual_kernel,
    langevin_kernel,
    transition_ends_kernel,
    transition_average_kernel,
)
