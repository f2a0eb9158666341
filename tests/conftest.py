"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from fluxkernels import backends, use_backend

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(params=[name for name, backend in backends().items() if backend.available])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can run here, in turn."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
