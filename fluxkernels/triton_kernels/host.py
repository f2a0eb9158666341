"""The `triton` backend for NVIDIA GPUs.

Functions, arguments and shapes are those of `fluxkernels.implementation`. Points in few dimensions go to `streaming`.
Others go to `fixed_point`, and float64 ones to `gram`: matrices of pairs are small compared with the points.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fluxkernels.implementation import Kernels
from fluxkernels.triton_kernels.fixed_point import host as fixed_point
from fluxkernels.triton_kernels.gram import host as gram
from fluxkernels.triton_kernels.philox import normal as normal
from fluxkernels.triton_kernels.sample_reference import sample_reference as sample_reference
from fluxkernels.triton_kernels.streaming import host as streaming

# A thread of `streaming` keeps a point in registers.
MOST_STREAMED = 16
# Arguments that hold the points of an op.
POINTS = "x", "x0", "z"


def _by_points(name: str) -> Callable[..., Any]:
    """The kernel `name` of the package that suits the dimension and dtype of its points."""
    few, many, in_float64 = (getattr(package, name) for package in (streaming, fixed_point, gram))
    # The cotangents that come first may have other dimensions than the points.
    place = next(i for i, argument in enumerate(inspect.signature(few).parameters) if argument in POINTS)

    @wraps(few)
    def run(*args: Any, **hints: Any) -> Any:
        points: Tensor = args[place]
        D = points.shape[-1]
        if D <= MOST_STREAMED:
            return few(*args, **hints)
        if points.dtype == torch.float64 or D > fixed_point.limits.MOST_DIMENSIONS:
            return in_float64(*args, **hints)
        return many(*args, **hints)

    return run


# One function for every kernel that is not above, such as `kde` and `flux_pass`.
for _name in (name for name in vars(Kernels) if not name.startswith("_") and name not in globals()):
    globals()[_name] = _by_points(_name)
