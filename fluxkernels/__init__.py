"""Kernels of Flux Matching: the minibatch kernel density estimate, its Langevin chain and its transition weights.

>>> import torch
>>> from fluxkernels import kde_score
>>> refs = torch.randn(1000, 2)
>>> kde_score(torch.zeros(1, 2), refs, 0.1, backend="torch").shape
torch.Size([1, 2])
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from fluxkernels.backend import Backend, BackendError, backends, resolve_backend, use_backend
from fluxkernels.ops import (
    FluxPass,
    flux_pass,
    kde_log_density,
    kde_mean,
    kde_score,
    langevin_chain,
    langevin_step,
    residual_gradient,
    transition_average,
    transition_weights,
)

try:
    __version__ = _version("fluxkernels")
except _PackageNotFoundError:  # run from a checkout, as `make gpu` does
    __version__ = "not-installed"

__all__ = [
    "Backend",
    "BackendError",
    "FluxPass",
    "backends",
    "flux_pass",
    "kde_log_density",
    "kde_mean",
    "kde_score",
    "langevin_chain",
    "langevin_step",
    "residual_gradient",
    "resolve_backend",
    "transition_average",
    "transition_weights",
    "use_backend",
]
