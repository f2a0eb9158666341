"""Chains by one kernel density estimate per step, for problems that are too large for Gram space."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxkernels.triton_kernels.launch import wide
from fluxkernels.triton_kernels.philox import CHAIN, START, normal

KDE = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def chain_by_steps(
    kde: KDE,
    x0: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(m(x0) - x0, x_τ); the arguments after `kde` are those of `langevin_chain`."""
    if noise is None:
        assert seed is not None
        noise = normal(seed, (num_steps, *x0.shape), CHAIN.value, wide(x0.dtype))
    variance = sigma2.unsqueeze(-1).expand(x0.shape[:2])
    h = (tau.double() / num_steps).view(-1, 1, 1)
    pull, spread = -torch.expm1(-h), (sigma2.view(-1, 1, 1) * -torch.expm1(-2 * h)).sqrt()
    x = x0.double()
    first = shift = kde(x, refs, variance)[0]
    for k in range(num_steps):
        if k > 0:
            shift = kde(x, refs, variance)[0]
        x = x + pull * shift + spread * noise[k]
    return first.to(x0.dtype), x.to(x0.dtype)


def pass_by_steps(
    kde: KDE,
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flux_pass`; the arguments after `kde` are its own."""
    if noise is None:
        assert seed is not None
        start, rest = normal(seed, (1, *x.shape), START.value, wide(x.dtype))[0], None
    else:
        start, rest = noise[0], noise[1:]
    x0 = (x.double() + sigma2.view(-1, 1, 1).double().sqrt() * start).to(x.dtype)
    shift0, xt = chain_by_steps(kde, x0, refs, sigma2, tau, num_steps, rest, seed)
    return x0, shift0, xt, kde(xt, refs, sigma2.unsqueeze(-1).expand(x.shape[:2]))[0]
