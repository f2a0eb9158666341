"""The cpu backend with one of its instruction sets."""

from collections.abc import Iterator
from contextlib import contextmanager

from fluxkernels import cpu


@contextmanager
def use_target(name: str) -> Iterator[None]:
    """Run the cpu backend with one of its instruction sets inside of the `with` block."""
    before = cpu._kernels.target()
    cpu._kernels.use(name)
    try:
        yield
    finally:
        cpu._kernels.use(before)
