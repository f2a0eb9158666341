"""Reference points drawn with the weights of a kernel, by the Gumbel-max trick."""

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.reference.kernel_average import prepare, weights


def _exponentials(seed: Tensor, elements: Tensor) -> Tensor:
    """Exponential random numbers in float64 of these elements of the stream, -log u with u = (word + ½)/2³²."""
    block = elements // 4
    zero = torch.zeros_like(block)
    counter = (block & philox.LOW, block >> 32, zero, torch.full_like(block, philox.REFERENCE))
    words = torch.stack(philox.philox(counter, (seed & philox.LOW, (seed >> 32) & philox.LOW)), -1)
    word = words.gather(-1, (elements % 4).unsqueeze(-1)).squeeze(-1)
    return -torch.log((word.double() + 0.5) * 2.0**-32)


def sample_reference(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    seed: Tensor,
) -> Tensor:
    """argmax_j (logit_nj - log E_nj) `[B, N]`, int64, with the exponential numbers E of the elements `[B, N, M]`."""
    problem, _ = prepare(z, refs, sigma2, None, log_weights, exclude_self, kernel)
    (B, N), M = z.shape[:2], refs.shape[1]
    every = torch.arange(B * N, device=z.device).view(B, N)
    parts = []
    for group, row, block in problem.blocks():
        elements = every[group, row].unsqueeze(-1) * M + torch.arange(M, device=z.device)
        w = weights(block, row.start or 0).w
        parts.append((w.log() - _exponentials(seed, elements).log()).argmax(-1).flatten())
    return torch.cat(parts).view(B, N)
