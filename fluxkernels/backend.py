"""Backends: `torch` (pure PyTorch), `cpu` (compiled C++), `triton` (NVIDIA GPUs).

The choice, first match: the call's `backend=`, the innermost `with use_backend(...)`, the environment variable
FLUXKERNELS_BACKEND, else automatic: CUDA tensors run on triton, CPU tensors on cpu, all others on torch. A backend
chosen by name runs or raises; only the automatic choice falls back to `torch`, with one warning per reason.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from fluxkernels import cards, cpu, reference
from fluxkernels.environment import INTERPRETED
from fluxkernels.implementation import Implementation

ENVIRONMENT = "FLUXKERNELS_BACKEND"


class BackendError(RuntimeError):
    """The chosen backend cannot run; the message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """One row of `backends()`.

    Attributes:
        name: value for `backend=`.
        what: a short description.
        devices: device types whose tensors it takes; empty means any.
        missing: reason why it cannot run here, or None if it can.
        refused: reasons why it cannot run on some cards of this machine, though it can on others.
    """

    name: str
    what: str
    devices: tuple[str, ...]
    missing: str | None
    refused: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        return self.missing is None


@dataclass(frozen=True)
class _Entry:
    what: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None]
    implementation: Callable[[], Implementation]
    refused: Callable[[int], str | None] | None = None  # by index of the card


def _triton() -> Implementation:
    """Import the backend on first use: Triton takes a second to import, and is optional."""
    return cast(Implementation, importlib.import_module(f"{__package__}.triton_kernels"))


@cache
def _triton_missing() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device was found"
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    try:
        version = importlib.import_module("triton").__version__
        if (reason := cards.too_old(version)) is not None:
            return reason
        _triton()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    reasons = _refused_cards()
    return "; ".join(reasons) if reasons and len(reasons) == torch.cuda.device_count() else None


def _refused_cards() -> tuple[str, ...]:
    indices = range(0 if INTERPRETED else torch.cuda.device_count())
    return tuple(reason for index in indices if (reason := cards.refused(index)) is not None)


_ENTRIES = {
    "torch": _Entry("pure PyTorch, reference implementation", (), lambda: None, lambda: reference),
    "cpu": _Entry("compiled C++", ("cpu",), cpu.missing, lambda: cpu),
    "triton": _Entry(
        "Triton kernels",
        ("cuda", "cpu") if INTERPRETED else ("cuda",),
        _triton_missing,
        _triton,
        None if INTERPRETED else cards.refused,
    ),
}
_AUTOMATIC = {"cuda": "triton", "cpu": "cpu"}

_in_use: ContextVar[str | None] = ContextVar("fluxkernels_backend", default=None)
_warned: set[str] = set()


def backends() -> dict[str, Backend]:
    """All backends by name; each has the reason why it cannot run here, if there is one."""
    found = {}
    for name, entry in _ENTRIES.items():
        missing = entry.missing()
        refused = _refused_cards() if missing is None and entry.refused else ()
        found[name] = Backend(name, entry.what, entry.devices, missing, refused)
    return found


def check_backend(name: str, source: str) -> str:
    """Return `name` if there is a backend of that name, available or not; `source` names it in the error."""
    if name not in _ENTRIES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, _ENTRIES))}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this thread inside the `with` block on backend `name`, unless the call names another.

    A graph of `torch.compile` keeps the backend it was compiled with.

    Raises:
        ValueError: no backend has that name.
    """
    token = _in_use.set(check_backend(name, "use_backend: name"))
    try:
        yield
    finally:
        _in_use.reset(token)


def _asked_for(backend: str | None) -> tuple[str, str] | None:
    """(name, source) of the backend chosen by name, or None for the automatic choice."""
    if backend is not None:
        return backend, "backend"
    if (name := _in_use.get()) is not None:
        return name, "use_backend"
    if name := os.environ.get(ENVIRONMENT):
        return name, ENVIRONMENT
    return None


def resolve_backend(backend: str | None, device: torch.device | str) -> str:
    """Name of the backend that runs an op on tensors of `device`.

    Args:
        backend: a name, or None for the choice described at the top of this module.
        device: where the op's tensors are.

    Raises:
        ValueError: no backend has that name.
        BackendError: the backend cannot run here, or not on that device.
    """
    if isinstance(device, str):
        device = torch.device(device)
    kind = device.type
    asked = _asked_for(backend)
    if asked is None:
        name = _AUTOMATIC.get(kind, "torch")
        missing = _missing(_ENTRIES[name], device)
        if missing is None:
            return name
        if missing not in _warned:
            _warned.add(missing)
            warnings.warn(
                f"fluxkernels runs {kind} tensors on its slower 'torch' backend: '{name}' is not available "
                f"({missing}). Choose backend='torch' to say that this is meant.",
                stacklevel=2,
            )
        return "torch"
    name = check_backend(*asked)
    entry = _ENTRIES[name]
    if (missing := _missing(entry, device)) is not None:
        raise BackendError(f"backend '{name}' was asked for but cannot run: {missing}")
    if entry.devices and kind not in entry.devices:
        raise BackendError(f"backend '{name}' takes tensors on {' or '.join(entry.devices)}, got {kind}")
    return name


def _missing(entry: _Entry, device: torch.device) -> str | None:
    """Reason why a backend cannot run on that device, or None."""
    missing = entry.missing()
    if missing is not None or entry.refused is None or device.type != "cuda":
        return missing
    return entry.refused(torch.cuda.current_device() if device.index is None else device.index)


def implementation(name: str) -> Implementation:
    """The functions of an available backend."""
    return _ENTRIES[name].implementation()
