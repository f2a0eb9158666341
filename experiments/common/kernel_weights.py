"""Weights of the reference points in a kernel density estimate, for studies with few points."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_weights(z: Tensor, refs: Tensor, sigma: float) -> Tensor:
    """Return the weights of reference points `[M, D]` in the density estimate at z `[n, D]`, `[n, M]`."""
    return (-0.5 * torch.cdist(z, refs).square() / sigma**2).softmax(1)


def mean_perplexity(z: Tensor, refs: Tensor, sigma: float) -> float:
    """Average exp(-Σ w log w) over the points z: how many centers share the weight, between 1 and M.

    `fluxmatching.effective_centers` is 1/Σ w², a smaller count of the same.
    """
    return torch.special.entr(kernel_weights(z, refs, sigma)).sum(1).exp().mean().item()
