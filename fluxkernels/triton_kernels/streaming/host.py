"""Kernels for few dimensions: reference points stream past queries, and no matrix of pairs is ever stored.

They compute in float32, and in float64 for float64 tensors.
"""

from collections.abc import Callable, Sequence
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


# Every kernel, with the numbers that it keeps per row of its tiles: for D dimensions and `width` columns of values.
_VALUES_PER_ROW: tuple[tuple[Any, Callable[[int, int], int]], ...] = (
    (kde_kernel, lambda D, width: D),
    (kde_backward_queries_kernel, lambda D, width: max(8, 2 * D)),
    (kde_backward_refs_kernel, lambda D, width: 3 * D + 4),
    (residual_kernel, lambda D, width: max(8, 2 * D)),
    (langevin_kernel, lambda D, width: 2 * D),
    (transition_ends_kernel, lambda D, width: D),
    (transition_average_kernel, lambda D, width: D + width + 2),
)
KERNELS = tuple(kernel for kernel, _ in _VALUES_PER_ROW)


def values_per_row(kernel: Any, D: int, width: int = 0) -> int:
    """Numbers that a kernel keeps per row of its tiles, if it takes `width` columns of values at once."""
    return next(values(D, width) for each, values in _VALUES_PER_ROW if each is kernel)


def _launch(
    kernel: Any,
    arguments: Sequence[Any],
    points: Tensor,
    queries: int,
    refs: int,
    more: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """`launch_streaming` with the kernel's own number of values per row."""
    per_row = values_per_row(kernel, points.shape[-1], constants.get("WIDTH", 0))
    launch_streaming(kernel, arguments, points, queries, refs, per_row, more, **constants)


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
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    whole_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ); without `whole_pass` only x_τ is computed."""
    N, M = x.shape[1], refs.shape[1]
    xt = x.new_empty(x.shape)
    x0, shift0, shift_t = (x.new_empty(x.shape) for _ in range(3)) if whole_pass else (xt, xt, xt)
    inputs = [part for t in (x, refs, sigma2, tau) for part in (t, *t.stride())]
    # `x` as a placeholder for the seed or noise is never read.
    random = [x if seed is None else seed, *((x, 0, 0, 0, 0) if noise is None else (noise, *noise.stride()))]
    with on_device_of(x):
        arguments = [*inputs, *random, x0, shift0, xt, shift_t, N, M, num_steps]
        _launch(langevin_kernel, arguments, x, N, M, PASS=whole_pass, SEEDED=noise is None)
    return x0, shift0, xt, shift_t


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    return _langevin(x0, refs, sigma2, tau, num_steps, noise, seed, False)[2]


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _langevin(x, refs, sigma2, tau, num_steps, noise, seed, True)


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
