"""Exponential Langevin chain (Eq. 8) in the field of a kernel density estimate."""

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.reference.blocks import centre, compute_dtype, map_blocks, upcast
from fluxkernels.reference.kde import kde, kde_formula


def chain_and_first_shift(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_τ, m(x0) - x0), each `[B, N, D]`: the first update needs the mean at x0 anyway. Arguments of the chain."""
    if noise is None:
        assert seed is not None
        noise = philox.normal(seed, (steps, *x0.shape), philox.CHAIN, compute_dtype(x0.device))

    def formula(x: Tensor, noise: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        h = (tau / steps).view(-1, 1, 1)
        diffusion = (sigma2.view(-1, 1, 1) * -torch.expm1(-2 * h)).sqrt()
        variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
        shifts = []
        for k in range(steps):
            mean, _ = kde_formula(x, variance, refs)
            shifts.append(mean - x)
            x = x - torch.expm1(-h) * shifts[k] + diffusion * noise[:, :, k]
        return x, shifts[0]

    start, refs, origin = centre(x0, refs)
    noise, sigma2, tau = upcast(noise, sigma2, tau)
    xt, shift0 = map_blocks(formula, (start, noise.movedim(0, 2)), (refs, sigma2, tau))
    return (xt + origin).to(x0.dtype), shift0.to(x0.dtype)


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    """x_τ `[B, N, D]` after `steps` updates of size h = τ/steps; sigma2 and tau `[B]`, noise `[steps, B, N, D]`.

    Each update is x + (1-e^{-h})(m(x) - x) + σ√(1-e^{-2h}) ξ_k, with ξ from `noise`, or from `seed` if that is None.
    """
    return chain_and_first_shift(x0, refs, sigma2, tau, steps, noise, seed)[0]


def flux_pass(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ), each `[B, N, D]`; noise `[1 + steps, B, N, D]`, its first entry makes x0."""
    if noise is None:
        assert seed is not None
        start = philox.normal(seed, (1, *x.shape), philox.START, compute_dtype(x.device))[0]
    else:
        (start,) = upcast(noise[0])
    x0 = (x + upcast(sigma2)[0].view(-1, 1, 1).sqrt() * start).to(x.dtype)
    chain_noise = None if noise is None else noise[1:]
    xt, shift0 = chain_and_first_shift(x0, refs, sigma2, tau, steps, chain_noise, seed)
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    return x0, shift0, xt, kde(xt, refs, variance)[0]
