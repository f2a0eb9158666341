"""The method as a researcher writes it, straight from the paper's equations in PyTorch: a baseline.

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


def kernel_average(z: Tensor, refs: Tensor, sigma2: float, values: Tensor, log_weights: Tensor) -> Tensor:
    return (log_weights.unsqueeze(-2) - squared_distances(z, refs) / (2 * sigma2)).softmax(-1) @ values


def drifting_field(x: Tensor, positives: Tensor, negatives: Tensor | None, bandwidth: float) -> Tensor:
    """Algorithm 2 of drifting models with its matrices; negatives None for x, where no sample drives itself away."""
    others = x if negatives is None else negatives
    near, far = torch.cdist(x, positives), torch.cdist(x, others)
    if negatives is None:
        far = far + 1e9 * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    logits = -torch.cat([near, far], -1) / bandwidth
    a = (logits.softmax(-1) * logits.softmax(-2)).sqrt()
    pull, push = a.split([positives.shape[-2], others.shape[-2]], -1)
    pull, push = pull * push.sum(-1, keepdim=True), push * pull.sum(-1, keepdim=True)
    return pull @ positives - push @ others


def langevin_step(x: Tensor, refs: Tensor, sigma2: float, h: float, noise: Tensor) -> Tensor:
    rho = math.exp(-h)
    mu = x + sigma2 * kde_score(x, refs, sigma2)
    return mu + rho * (x - mu) + math.sqrt(sigma2 * (1 - rho**2)) * noise


def langevin_chain(x0: Tensor, refs: Tensor, sigma2: float, tau: float, noise: Tensor) -> Tensor:
    x = x0
    for xi in noise:
        x = langevin_step(x, refs, sigma2, tau / len(noise), xi)
    return x


def transition_weights(x0: Tensor, xt: Tensor, refs: Tensor, sigma2: float, tau: float) -> Tensor:
    mu = x0 + (1 - math.exp(-tau)) * sigma2 * kde_score(x0, refs, sigma2)
    variance = sigma2 * (1 - math.exp(-2 * tau))
    return (-squared_distances(mu, xt) / (2 * variance)).softmax(-2)


def transition_average(x0: Tensor, xt: Tensor, values: Tensor, refs: Tensor, sigma2: float, tau: float) -> Tensor:
    return transition_weights(x0, xt, refs, sigma2, tau) @ values


def residual(field: Callable[[Tensor], Tensor], score: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """(r = ∇·u + u·s, u = f - s) with an exact divergence, differentiable in z `[..., N, D]`."""
    s = score(z)
    u = field(z) - s
    rows = [torch.autograd.grad(u[..., d].sum(), z, create_graph=True)[0][..., d] for d in range(z.shape[-1])]
    return torch.stack(rows).sum(0) + (u * s).sum(-1), u


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: float) -> Tensor:
    """∇r for a field that is constant in z, which is J_s f - ∇(Δp̂/p̂)."""
    z = z.detach().requires_grad_()
    r, _ = residual(lambda _: field, lambda y: kde_score(y, refs, sigma2), z)
    (gradient,) = torch.autograd.grad(r.sum(), z)
    return gradient


def flux_loss(
    field: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    x0: Tensor,
    sigma2: float,
    tau_max: float = 4.0,
    num_steps: int = 4,
    *,
    tau: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. 6 for one minibatch `[N, D]`, q uniform; ∇r by autograd through everything; draws τ and noise if not given.

    Args:
        score: score of the density that x0 is drawn from.
        tau: horizon.
        noise: noise of the chain, `[num_steps, N, D]`.
    """
    tau = torch.rand((), dtype=x0.dtype) * tau_max if tau is None else tau
    noise = torch.randn(num_steps, *x0.shape, dtype=x0.dtype) if noise is None else noise
    rho = torch.exp(-tau / num_steps)
    xt = x0
    for xi in noise:
        mu = xt + sigma2 * score(xt)
        xt = rho * xt + (1 - rho) * mu + (sigma2 * (1 - rho.square())).sqrt() * xi

    end = xt.detach().requires_grad_()
    r, _ = residual(field, score, end)
    (gradient,) = torch.autograd.grad(r.sum(), end)

    s = score(x0)
    mean = x0 + (1 - torch.exp(-tau)) * sigma2 * s
    variance = sigma2 * (1 - torch.exp(-2 * tau))
    w = (-squared_distances(mean, xt) / (2 * variance)).softmax(0)
    target = tau_max * torch.exp(-tau) * (w @ gradient)
    return -2 * ((field(x0.requires_grad_()) - s) * target).sum(1)
