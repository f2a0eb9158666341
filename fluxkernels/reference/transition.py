"""Transition weights of the linearized chain (Eq. 52) and the average they define (Eq. 9)."""

import torch
from torch import Tensor

from fluxkernels.reference.blocks import blocks, center, map_blocks, upcast
from fluxkernels.reference.kde import squared_distances


def columns_formula(xt: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor]:
    """softmax_i(-|x_τ^j - μ_i|²/2v) as row j: `[B, N', N]`, the transposed weights of one centered block."""
    return ((squared_distances(xt, mean) * (-0.5 / variance).view(-1, 1, 1)).softmax(-1),)


def transition(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centered (x_τ `[B, N', D]`, μ `[B, N, D]`, v `[B]`): μ = x0 + (1-e^{-τ})(m(x0) - x0), v = σ²(1-e^{-2τ}).

    v is at least rounding: τ = 0 then gives the limit, where the nearest start has all the weight, instead of 0/0.
    """
    xt, x0, _ = center(xt, x0)
    shift0, sigma2, tau = upcast(shift0, sigma2, tau)
    variance = sigma2 * (-torch.expm1(-2 * tau)).clamp_min(torch.finfo(xt.dtype).eps ** 2)
    return xt, x0 - torch.expm1(-tau).view(-1, 1, 1) * shift0, variance


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    """w `[B, N, N']`, columns sum to one; shift0 = m(x0) - x0, sigma2 and tau `[B]`."""
    end, mean, variance = transition(x0, shift0, xt, sigma2, tau)
    (columns,) = map_blocks(columns_formula, (end,), (mean, variance))
    return columns.mT.to(x0.dtype).contiguous()


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    """Σ_j w_ij values_j, `[B, N, V]`, for values `[B, N', V]`; blocks run over the ends j and are summed."""
    end, mean, variance = transition(x0, shift0, xt, sigma2, tau)
    (per_end,) = upcast(values)
    groups = []
    for group, rows in blocks(end, mean):
        total: Tensor | None = None
        for row in rows:
            (columns,) = columns_formula(end[group, row], mean[group], variance[group])
            part = columns.mT @ per_end[group, row]
            total = part if total is None else total + part
        assert total is not None
        groups.append(total)
    return torch.cat(groups).to(values.dtype)
