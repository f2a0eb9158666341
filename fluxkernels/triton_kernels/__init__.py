"""The `triton` backend for NVIDIA GPUs: fused kernels for points in few dimensions.

Functions, arguments and shapes are those of `fluxkernels.reference`. They compute in float32, for float64 in float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxkernels.triton_kernels.kde import kde_backward_queries_kernel, kde_backward_refs_kernel, kde_kernel
from fluxkernels.triton_kernels.langevin import langevin_kernel
from fluxkernels.triton_kernels.launch import accumulator, blocks, grid, on_device_of
from fluxkernels.triton_kernels.philox import normal_kernel
from fluxkernels.triton_kernels.residual import residual_kernel
from fluxkernels.triton_kernels.transition import transition_average_kernel, transition_ends_kernel

MOST_DIMENSIONS = 16
# Columns of values that a program of `transition_average` keeps in registers.
MOST_VALUES = 8


def _common(points: Tensor, numbers: int | None = None) -> dict[str, Any]:
    """Arguments that all kernels have by name; `numbers` of every row of a tile, its coordinates unless said."""
    D = points.shape[-1]
    return {"D": D, "ACC": accumulator(points.dtype), **blocks(numbers or D, points.dtype)}


def normal(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """`fluxkernels.philox.normal`."""
    numbers = torch.empty(shape, dtype=dtype, device=seed.device)
    elements, block = math.prod(shape[1:]), 1024
    with on_device_of(seed):
        normal_kernel[(-(-elements // block), shape[0])](seed, numbers, elements, STREAM=stream, BLOCK=block)
    return numbers


def kde(z: Tensor, refs: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), M = z.shape, refs.shape[1]
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:-1])
    with on_device_of(z):
        kde_kernel[grid(N, B)](
            *(z, *z.stride(), refs, *refs.stride(), sigma2, *sigma2.stride()),
            *(shift, mean, log_density, N, M, math.log(M)),
            **_common(z),
        )
    return shift, mean, log_density


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), M = z.shape, refs.shape[1]
    g_z, g_refs, g_sigma2 = z.new_empty(z.shape), refs.new_empty(refs.shape), sigma2.new_empty(sigma2.shape)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    statistics = torch.empty((B, N, 2 + D), dtype=wide, device=z.device)
    inputs = [part for t in (z, refs, sigma2, g_shift, g_mean, g_log_density) for part in (t, *t.stride())]
    with on_device_of(z):
        kde_backward_queries_kernel[grid(N, B)](*inputs, g_z, g_sigma2, statistics, N, M, **_common(z))
        kde_backward_refs_kernel[grid(M, B)](*inputs, statistics, g_refs, N, M, **_common(z, 3 * D + 4))
    return g_z, g_refs, g_sigma2


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor) -> Tensor:
    (B, N, _), M = z.shape, refs.shape[1]
    gradient = z.new_empty(z.shape)
    inputs = [part for t in (z, field, refs, sigma2) for part in (t, *t.stride())]
    with on_device_of(z):
        residual_kernel[grid(N, B)](*inputs, gradient, N, M, **_common(z))
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
    (B, N, _), M = x.shape, refs.shape[1]
    inputs = [part for t in (x, refs, sigma2, tau) for part in (t, *t.stride())]
    # What is absent is never read; any tensor stands for it.
    noise_and_strides = (x, 0, 0, 0, 0) if noise is None else (noise, *noise.stride())
    with on_device_of(x):
        langevin_kernel[grid(N, B)](
            *(*inputs, x if seed is None else seed, *noise_and_strides, *results, N, M, steps),
            PASS=whole_pass,
            SEEDED=noise is None,
            **_common(x),
        )


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
) -> list[Any]:
    """Run the first kernel of a transition; returns the arguments that both kernels begin with, in three parts."""
    (B, N, _), E = x0.shape, xt.shape[1]
    points = [part for t in (x0, shift0, xt) for part in (t, *t.stride())]
    times = [sigma2, *sigma2.stride(), tau, *tau.stride()]
    transition_ends_kernel[grid(E, B)](
        *(*points, *times, statistics, statistics if weights is None else weights, N, E),
        WEIGHTS=weights is not None,
        **_common(x0),
    )
    return [points, times]


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    with on_device_of(x0):
        _ends(x0, shift0, xt, sigma2, tau, weights, weights)
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    (B, N, _), (E, V) = x0.shape, values.shape[1:]
    average = values.new_empty((B, N, V))
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    statistics = torch.empty((B, 2, E), dtype=wide, device=x0.device)
    width = min(V, MOST_VALUES)
    with on_device_of(x0):
        points, times = _ends(x0, shift0, xt, sigma2, tau, statistics, None)
        transition_average_kernel[grid(N, B, -(-V // width))](
            *(*points, values, *values.stride(), *times, statistics, average, N, E, V),
            WIDTH=width,
            **_common(x0, x0.shape[-1] + width + 2),
        )
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
