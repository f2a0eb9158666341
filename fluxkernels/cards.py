"""Releases of Triton and NVIDIA cards that are known to fail, and why. Importable without Triton."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

Capability = tuple[int, int]
Release = tuple[int, int]
OLDEST_TRITON: Release = (3, 6)  # as pyproject.toml declares


@dataclass(frozen=True)
class Failure:
    """A combination that fails.

    Attributes:
        cards: whether it concerns a compute capability.
        releases: whether it concerns a release of Triton.
        reason: the end of a sentence about the card.
    """

    cards: Callable[[Capability], bool]
    releases: Callable[[Release], bool]
    reason: str


KNOWN = (Failure(lambda card: card < (8, 0), lambda triton: True, "Triton supports compute capability 8.0 and newer"),)


def release(version: str) -> Release:
    """(3, 6) for "3.6.0+git1234"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else OLDEST_TRITON


def too_old(version: str) -> str | None:
    """Reason why no card can run the kernels with this version of Triton, or None."""
    if release(version) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"Triton {version} is too old, the kernels need {oldest} or newer; pip install --upgrade triton"


def failure(capability: Capability, version: str) -> str | None:
    """Reason why a card of that compute capability cannot run the kernels with this version of Triton, or None."""
    for known in KNOWN:
        if known.cards(capability) and known.releases(release(version)):
            return known.reason
    name = _unknown_to_the_assembler(capability)
    if name is None:
        return None
    return f"the assembler of Triton {version} does not know {name}; pip install --upgrade triton"


def _unknown_to_the_assembler(capability: Capability) -> str | None:
    """Name of the card's architecture if the assembler that Triton would run for it has others only, or None."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

        number = 10 * capability[0] + capability[1]
        name, command = sm_arch_from_capability(number), [get_ptxas(number).path, "--help"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (ImportError, AttributeError, RuntimeError, OSError, subprocess.SubprocessError):
        return None  # another layout of Triton, about which nothing is known
    names = re.findall(r"'(sm_\w+)'", listed)
    return None if not names or name in names else name


@cache
def refused(index: int) -> str | None:
    """Reason why the installed Triton fails on the card with that index, or None."""
    import triton

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    reason = failure(capability, triton.__version__)
    number = ".".join(map(str, capability))
    return None if reason is None else f"cuda:{index}, {name} of compute capability {number}: {reason}"
