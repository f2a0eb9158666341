"""The closed-form part of ∇r, which needs the kernel density estimate alone."""

import torch
from torch import Tensor

from fluxkernels.reference.blocks import center, map_blocks, upcast
from fluxkernels.reference.kde import weights


def residual_formula(z: Tensor, field: Tensor, sigma2: Tensor, factor: Tensor, refs: Tensor) -> tuple[Tensor]:
    """J_s f - c ∇(Δp̂/p̂) of one centered block, `[B, N, D]`, with the factors c `[B, N]`.

    Both terms are moments about m of the same weights: with e_j = r_j - m and a_j = |z - r_j|², they are
    Σ_j w_j e_j [e_j·f - c (a_j - ā)/σ²]/σ⁴ - f/σ² - 2c (z - m)/σ⁴.
    """
    a, w, _ = weights(z, refs, sigma2)
    sigma2, factor = sigma2.unsqueeze(-1), factor.unsqueeze(-1)
    mean = w @ refs
    along = field @ refs.mT - (field * mean).sum(-1, keepdim=True)
    c = w * (along - factor * (a - (w * a).sum(-1, keepdim=True)) / sigma2)
    moment = c @ refs - c.sum(-1, keepdim=True) * mean
    return ((moment - 2 * factor * (z - mean)) / sigma2.square() - field / sigma2,)


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    """J_s f - c ∇(Δp̂/p̂) for z and field `[B, N, D]`, refs `[B, M, D]`, sigma2 and factor `[B, N]`, None for 1."""
    query, refs, _ = center(z, refs)
    factor = torch.ones_like(sigma2) if factor is None else factor
    (gradient,) = map_blocks(residual_formula, (query, *upcast(field, sigma2, factor)), (refs,))
    return gradient.to(z.dtype)
