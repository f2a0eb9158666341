"""Weights and averages of the ends of chains under the transition from their starts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host.derivatives import gather
from fluxkernels.triton_kernels.fixed_point.host.points import Points
from fluxkernels.triton_kernels.fixed_point.host.weights import Weights, blocks_of
from fluxkernels.triton_kernels.launch import on_device_of, widened


def _transition(
    x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor, words: bool
) -> Iterator[tuple[slice, slice, Weights]]:
    """Yield (groups, ends j, weights of the starts) block by block: the ends are queries, the means refs."""
    variance = sigma2.unsqueeze(-1).expand(xt.shape[:2])
    x0, shift0, xt = widened(x0, shift0, xt)
    for (group, ends), block in blocks_of(xt, x0, variance, (shift0, tau)):
        yield group, ends, Weights(block, transition=(shift0[group], tau[group]), words=words)


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    with on_device_of(x0):
        for group, ends, found in _transition(x0, shift0, xt, sigma2, tau, False):
            weights[group, :, ends] = (found.logits.exp2_() / found.totals.unsqueeze(-1)).mT
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    average = torch.zeros((*x0.shape[:2], values.shape[-1]), dtype=torch.float64, device=x0.device)
    with on_device_of(x0):
        for group, ends, found in _transition(x0, shift0, xt, sigma2, tau, True):
            (of_ends,) = widened(values[group, ends])
            gather(average[group], found, Points(of_ends, of_ends, centered=False))
    return average.to(values.dtype)
