"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fluxkernels import backends, cpu, use_backend
from tests.support.targets import use_target

torch.set_num_threads(min(2, os.cpu_count() or 1))

AVAILABLE = [name for name, b in backends().items() if b.available and (not b.devices or "cpu" in b.devices)]
TARGETS = cpu._kernels.targets() if "cpu" in AVAILABLE else []


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can run here, in turn."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the cpu backend that this machine runs, in turn."""
    with use_target(request.param):
        yield request.param


@pytest.fixture(params=[name for name in AVAILABLE if name != "cpu"] + [f"cpu {target}" for target in TARGETS])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can run here, the cpu backend with each instruction set of this machine, in turn."""
    name, *targets = request.param.split()
    with use_backend(name), use_target(*targets) if targets else nullcontext():
        yield name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
