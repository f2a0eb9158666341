"""The `cpu` backend."""

from fluxkernels.cpu.host import *  # noqa: F403
