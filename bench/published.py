"""The method as a researcher writes it, straight from the paper's equations in PyTorch: the peer of every comparison.

Squared distances by the expansion |a|² + |b|² - 2 a·b, the KDE differentiated twice by autograd, `torch.randn` noise.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT


def kde_mean(z: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    return (-squared_distances(z, refs) / (2 * sigma2)).softmax(-1) @ refs


def kde_score(z: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    return (kde_mean(z, refs, sigma2) - z) / sigma2


def kde_log_density(z: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    M, D = refs.shape[-2:]
    logits = -squared_distances(z, refs) / (2 * sigma2)
    return logits.logsumexp(-1) - math.log(M) - 0.5 * D * math.log(2 * math.pi * sigma2)


def langevin_chain(x: Tensor, refs: Tensor, sigma2: float, tau: float, noise: Tensor) -> Tensor:
    rho = math.exp(-tau / len(noise))
    for xi in noise:
        mu = x + sigma2 * kde_score(x, refs, sigma2)
        x = mu + rho * (x - mu) + math.sqrt(sigma2 * (1 - rho**2)) * xi
    return x


def transition_weights(x0: Tensor, xt: Tensor, refs: Tensor, sigma2: float, tau: float) -> Tensor:
    mu = x0 + (1 - math.exp(-tau)) * sigma2 * kde_score(x0, refs, sigma2)
    variance = sigma2 * (1 - math.exp(-2 * tau))
    return (-squared_distances(mu, xt) / (2 * variance)).softmax(-2)


def residual(field: Callable[[Tensor], Tensor], z: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    """r = ∇·u + u·s with an exact divergence, differentiable in z `[N, D]`."""
    s = kde_score(z, refs, sigma2)
    u = field(z) - s
    rows = [torch.autograd.grad(u[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(z.shape[1])]
    return torch.stack(rows).sum(0) + (u * s).sum(-1)


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    """∇r for a field that is constant in z, which is J_s f - ∇(Δp̂/p̂)."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(residual(lambda _: field, z, refs, sigma2).sum(), z)
    return gradient
