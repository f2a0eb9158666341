"""Exponential Langevin chain (Eq. 8) in the field of a kernel density estimate."""

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.reference.blocks import center, compute_dtype, map_blocks, upcast
from fluxkernels.reference.kde import kde, kde_formula


def chain_and_first_shift(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_τ, m(x0) - x0), each `[B, N, D]`, for the arguments of the chain. The first update computes m(x0) anyway."""
    if noise is None:
        assert seed is not None
        noise = philox.normal(seed, (num_steps, *x0.shape), philox.CHAIN, compute_dtype(x0.device))

    def formula(x: Tensor, noise: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        h = (tau / num_steps).view(-1, 1, 1)
        diffusion = (sigma2.view(-1, 1, 1) * -torch.expm1(-2 * h)).sqrt()
        variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
        shifts = []
        for k in range(num_steps):
            mean, _ = kde_formula(x, variance, refs)
            shifts.append(mean - x)
            x = x - torch.expm1(-h) * shifts[k] + diffusion * noise[:, :, k]
        return x, shifts[0]

    start, refs, origin = center(x0, refs)
    noise, sigma2, tau = upcast(noise, sigma2, tau)
    xt, shift0 = map_blocks(formula, (start, noise.movedim(0, 2)), (refs, sigma2, tau))
    return (xt + origin).to(x0.dtype), shift0.to(x0.dtype)


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    """x_τ `[B, N, D]` after `num_steps` updates of size h = τ/num_steps, for sigma2 and tau `[B]`.

    Each update is x + (1-e^{-h})(m(x) - x) + σ√(1-e^{-2h}) ξ_k, with ξ from the noise `[num_steps, B, N, D]`, or from
    `seed` if the noise is None.
    """
    return chain_and_first_shift(x0, refs, sigma2, tau, num_steps, noise, seed)[0]


def flux_pass(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ), each `[B, N, D]`; the first of the noise `[1 + num_steps, ...]` makes x0."""
    if noise is None:
        assert seed is not None
        start = philox.normal(seed, (1, *x.shape), philox.START, compute_dtype(x.device))[0]
    else:
        (start,) = upcast(noise[0])
    x0 = (x + upcast(sigma2)[0].view(-1, 1, 1).sqrt() * start).to(x.dtype)
    chain_noise = None if noise is None else noise[1:]
    xt, shift0 = chain_and_first_shift(x0, refs, sigma2, tau, num_steps, chain_noise, seed)
    variance = sigma2.unsqueeze(-1).expand(x.shape[:2])
    return x0, shift0, xt, kde(xt, refs, variance)[0]
