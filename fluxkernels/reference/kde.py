"""Kernel density estimate (Eq. 7): displacement to the weighted mean, log-density, and their derivatives."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fluxkernels.devices import has_values
from fluxkernels.implementation import KDE_RESULTS, wants_mean
from fluxkernels.reference.blocks import DIRECT_DIMENSIONS, blocks, center, map_blocks, upcast

# Dimensions whose differences are formed at once, for all pairs of a block, where values cannot be read.
DIMENSIONS_AT_ONCE = 64
# Pairs that are recomputed from their differences at once, where the matrix product has canceled.
NEAR_PAIRS = 4096


def squared_distances(z: Tensor, refs: Tensor) -> Tensor:
    """|z_n - r_j|², `[B, N, M]`, for centered z `[B, N, D]` and refs `[B, M, D]`."""
    if z.shape[-1] <= DIRECT_DIMENSIONS:
        first, *others = range(z.shape[-1])
        total = (z[..., first, None] - refs[..., None, :, first]).square()
        for d in others:
            difference = z[..., d, None] - refs[..., None, :, d]
            total = torch.addcmul(total, difference, difference)
        return total
    if not has_values(z):  # which the correction below depends on
        parts = zip(z.split(DIMENSIONS_AT_ONCE, -1), refs.split(DIMENSIONS_AT_ONCE, -1), strict=True)
        total, *others = ((a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) for a, b in parts)
        for other in others:
            total = total + other
        return total
    norms = z.square().sum(-1).unsqueeze(-1) + refs.square().sum(-1).unsqueeze(-2)
    total = torch.baddbmm(norms, z, refs.mT, alpha=-2)
    # |z|² + |r|² - 2 z·r has lost its digits where it is small compared with its terms: take differences there.
    near = total.detach() < 64 * torch.finfo(z.dtype).eps ** 0.5 * norms.detach()
    for b, n, j in zip(*(index.split(NEAR_PAIRS) for index in near.nonzero(as_tuple=True)), strict=True):
        total = total.index_put((b, n, j), (z[b, n] - refs[b, j]).square().sum(-1))
    return total


def weights(z: Tensor, refs: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_nj = |z_n - r_j|², w_nj = softmax_j(-a_nj/2σ_n²), both `[B, N, M]`, and log Σ_j exp(-a_nj/2σ_n²) `[B, N]`."""
    distances = squared_distances(z, refs)
    logits = distances * (-0.5 / sigma2).unsqueeze(-1)
    # Divide by the sum, not by exp(log-sum-exp): far from all reference points the logits are large, and with their
    # rounding errors the weights would not sum to one.
    top = logits.detach().amax(-1, keepdim=True)
    relative = (logits - top).exp()
    total = relative.sum(-1, keepdim=True)
    return distances, relative / total, (top + total.log()).squeeze(-1)


def kde_formula(z: Tensor, sigma2: Tensor, refs: Tensor, moments: bool = True) -> tuple[Tensor, Tensor]:
    """(m(z) `[B, N, D]`, or z without `moments`, log p̂(z) `[B, N]`) of one centered block."""
    _, w, normalizer = weights(z, refs, sigma2)
    M, D = refs.shape[-2:]
    return w @ refs if moments else z, normalizer - math.log(M) - 0.5 * D * (math.log(2 * math.pi) + sigma2.log())


def kde_backward_formula(
    g_mean: Tensor, g_log_density: Tensor, z: Tensor, sigma2: Tensor, refs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of `kde_formula`: cotangents of z `[B, N, D]`, refs `[B, M, D]`, σ² `[B, N]`.

    With logits L_j = -|z - r_j|²/2σ² and v the cotangent of m, the cotangent of L_j is
    c_j = w_j ((r_j - m)·v + g), g that of log p̂; the rest is the chain rule through L_j and through r_j in m.
    """
    distances, w, _ = weights(z, refs, sigma2)
    mean = w @ refs
    c = w * (g_mean @ refs.mT + (g_log_density - (g_mean * mean).sum(-1)).unsqueeze(-1))
    scaled = c / sigma2.unsqueeze(-1)
    g_z = scaled @ refs - scaled.sum(-1, keepdim=True) * z
    g_refs = w.mT @ g_mean + scaled.mT @ z - scaled.sum(-2).unsqueeze(-1) * refs
    g_sigma2 = 0.5 * ((scaled * distances).sum(-1) - z.shape[-1] * g_log_density) / sigma2
    return g_z, g_refs, g_sigma2


def kde(z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS) -> tuple[Tensor, Tensor, Tensor]:
    """(m(z) - z, m(z), log p̂(z)) for z `[B, N, D]`, refs `[B, M, D]`, sigma2 `[B, N]`; each rounded once."""
    dtype = z.dtype
    z, refs, origin = center(z, refs)
    formula = partial(kde_formula, moments=wants_mean(results))
    mean, log_density = map_blocks(formula, (z, *upcast(sigma2)), (refs,))
    return (mean - z).to(dtype), (mean + origin).to(dtype), log_density.to(dtype)


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of z, refs and sigma2 from those of `kde`'s results."""
    dtype, sigma2_dtype = z.dtype, sigma2.dtype
    z, refs, _ = center(z, refs)
    g_shift, g_mean, g_log_density, sigma2 = upcast(g_shift, g_mean, g_log_density, sigma2)
    g_mean = g_mean + g_shift
    g_z, g_refs, g_sigma2 = torch.empty_like(z), torch.zeros_like(refs), torch.empty_like(g_log_density)
    for group, rows in blocks(z, refs):
        for row in rows:
            block = group, row
            g_z[block], g_refs_block, g_sigma2[block] = kde_backward_formula(
                g_mean[block], g_log_density[block], z[block], sigma2[block], refs[group]
            )
            g_refs[group] += g_refs_block
    return (g_z - g_shift).to(dtype), g_refs.to(dtype), g_sigma2.to(sigma2_dtype)
