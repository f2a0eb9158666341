"""Kernels of Flux Matching: the minibatch kernel density estimate, its Langevin chain and its transition weights.

>>> import torch
>>> from fluxkernels import kde_score
>>> refs = torch.randn(1000, 2)
>>> kde_score(torch.zeros(1, 2), refs, 0.1, backend="torch").shape
torch.Size([1, 2])
"""

from fluxkernels.backend import Backend, BackendError, backends, resolve_backend, use_backend
from fluxkernels.ops.kde import kde_log_density, kde_mean, kde_score
from fluxkernels.ops.kernel_average import kernel_average, merge_averages
from fluxkernels.ops.langevin import FluxPass, flux_pass, langevin_chain, langevin_step
from fluxkernels.ops.residual import residual_gradient
from fluxkernels.ops.sample_reference import sample_reference
from fluxkernels.ops.sharding import sharded_kernel_average
from fluxkernels.ops.transition import transition_average, transition_weights
from fluxkernels.version import __version__
from fluxkernels.warming import warm_up

__all__ = [
    "Backend",
    "BackendError",
    "FluxPass",
    "__version__",
    "backends",
    "flux_pass",
    "kde_log_density",
    "kde_mean",
    "kde_score",
    "kernel_average",
    "langevin_chain",
    "langevin_step",
    "merge_averages",
    "residual_gradient",
    "resolve_backend",
    "sample_reference",
    "sharded_kernel_average",
    "transition_average",
    "transition_weights",
    "use_backend",
    "warm_up",
]
