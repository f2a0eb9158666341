"""Kernels for few dimensions."""

from fluxkernels.triton_kernels.streaming.host import *  # noqa: F403
