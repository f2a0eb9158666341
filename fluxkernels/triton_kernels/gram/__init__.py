"""Kernels for many dimensions."""

from fluxkernels.triton_kernels.gram.host import *  # noqa: F403
