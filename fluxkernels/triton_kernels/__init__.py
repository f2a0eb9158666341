"""The `triton` backend for NVIDIA GPUs.

Functions, arguments and shapes are those of `fluxkernels.reference`. Points in few dimensions go to `streaming`, others
to `gram`, whose matrices of pairs are small beside the points themselves.
"""

from types import ModuleType

from torch import Tensor

from fluxkernels.triton_kernels import gram, streaming
from fluxkernels.triton_kernels.philox import normal, normal_kernel

# A thread of `streaming` keeps a point in registers.
MOST_STREAMED = 16

KERNELS = (normal_kernel, *streaming.KERNELS, *gram.KERNELS)

__all__ = [
    "KERNELS", "flux_pass", "kde", "kde_backward", "langevin_chain", "normal", "residual_gradient",
    "transition_average", "transition_weights",
]  # fmt: skip


def _kernels(points: Tensor) -> ModuleType:
    return streaming if points.shape[-1] <= MOST_STREAMED else gram


def kde(z: Tensor, refs: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(z).kde(z, refs, sigma2)


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(z).kde_backward(g_shift, g_mean, g_log_density, z, refs, sigma2)


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor) -> Tensor:
    return _kernels(z).residual_gradient(z, field, refs, sigma2)


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    return _kernels(x0).langevin_chain(x0, refs, sigma2, tau, steps, noise, seed)


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(x).flux_pass(x, refs, sigma2, tau, steps, noise, seed)


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    return _kernels(x0).transition_weights(x0, shift0, xt, sigma2, tau)


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    return _kernels(x0).transition_average(x0, shift0, xt, values, sigma2, tau)
