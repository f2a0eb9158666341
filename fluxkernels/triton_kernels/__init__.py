"""The `triton` backend."""

from fluxkernels.triton_kernels.host import *  # noqa: F403
