"""Density estimates, their derivatives, and the gradient of the residual."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkernels.implementation import KDE_RESULTS, wants_mean
from fluxkernels.triton_kernels.fixed_point.host.derivatives import Moments, gather
from fluxkernels.triton_kernels.fixed_point.host.products import row_shape
from fluxkernels.triton_kernels.fixed_point.host.weights import Block, Weights, blocks_of
from fluxkernels.triton_kernels.fixed_point.kde import kde_results_kernel
from fluxkernels.triton_kernels.launch import launch, on_device_of, strided, widened


def kde(z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS) -> tuple[Tensor, Tensor, Tensor]:
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:2])
    z, refs = widened(z, refs)
    with on_device_of(z):
        for at, block in blocks_of(z, refs, sigma2):
            weights = Weights(block, log_density=log_density[at], relative=True)
            if wants_mean(results):
                kde_results(block, weights, shift[at], mean[at])
            del block, weights
    return shift, mean, log_density


def kde_results(block: Block, weights: Weights, shift: Tensor, mean: Tensor) -> None:
    """Write m - x and m of a block."""
    B, N, D = shift.shape
    sums = block.points.sums(weights.words, D)
    launch(
        kde_results_kernel,
        (B * N,),
        *(sums, block.points.exponents, weights.logits, weights.scales, weights.totals, weights.heaviest),
        *(*strided(block.x, block.refs, block.sigma2), shift, mean, N, block.refs.shape[1], D),
        **row_shape(D),
    )


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g_z, g_sigma2 = z.new_empty(z.shape), sigma2.new_empty(sigma2.shape)
    g_refs = torch.zeros(refs.shape, dtype=torch.float64, device=z.device)
    refs_dtype = refs.dtype
    z, refs, g_shift, g_mean, g_log_density = widened(z, refs, g_shift, g_mean, g_log_density)
    g_moved = g_mean + g_shift
    with on_device_of(z):
        for at, block in blocks_of(z, refs, sigma2):
            weights = Weights(block)
            g, of_variance = g_log_density[at], g_sigma2[at]
            moments = Moments(block, weights, g_moved[at], g_z[at], added=g_shift[at], g=g, g_sigma2=of_variance)
            gather(g_refs[at[0]], weights, moments.field, (moments, block))
            del block, weights, moments
    return g_z, g_refs.to(refs_dtype), g_sigma2


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    gradient = z.new_empty(z.shape)
    z, field, refs = widened(z, field, refs)
    with on_device_of(z):
        for at, block in blocks_of(z, refs, sigma2):
            given = None if factor is None else factor[at]
            Moments(block, Weights(block, words=False), field[at], gradient[at], added=field[at], g=given)
            del block
    return gradient
