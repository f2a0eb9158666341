"""The `triton` backend for NVIDIA GPUs.

Functions, arguments and shapes are those of `fluxkernels.implementation`. Points in few dimensions go to `streaming`,
others to `gram`, whose matrices of pairs are small compared with the points.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from fluxkernels.implementation import Kernels
from fluxkernels.triton_kernels.gram import host as gram
from fluxkernels.triton_kernels.philox import normal as normal
from fluxkernels.triton_kernels.philox import normal_kernel
from fluxkernels.triton_kernels.streaming import host as streaming

# A thread of `streaming` keeps a point in registers.
MOST_STREAMED = 16

KERNELS = (normal_kernel, *streaming.KERNELS, *gram.KERNELS)

Others = ParamSpec("Others")
Result = TypeVar("Result")


def _by_dimension(
    few: Callable[Concatenate[Tensor, Others], Result], many: Callable[Concatenate[Tensor, Others], Result]
) -> Callable[Concatenate[Tensor, Others], Result]:
    """`few` or `many`, whichever suits the dimension of the first argument."""

    @wraps(few)
    def run(points: Tensor, *args: Others.args, **kwargs: Others.kwargs) -> Result:
        return (few if points.shape[-1] <= MOST_STREAMED else many)(points, *args, **kwargs)

    return run


# One function for every kernel, such as `kde` and `flux_pass`.
for _name in (name for name in vars(Kernels) if not name.startswith("_")):
    globals()[_name] = _by_dimension(getattr(streaming, _name), getattr(gram, _name))
