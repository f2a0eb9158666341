"""Kernels for many dimensions in fixed point."""

from fluxkernels.triton_kernels.fixed_point.host import *  # noqa: F403
