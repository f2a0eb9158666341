"""Report of `python -m fluxkernels`: versions, backends, cards, known faults, self-check, caches, environment."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fluxkernels import cards, cpu, environment, selfcheck
from fluxkernels.backend import ENVIRONMENT, Backend, BackendError, backends, resolve_backend
from fluxkernels.version import __version__

TESTED_TORCH = ("2.11", "2.15")  # the oldest and the newest release that the tests have run with
COMPILERS = ("c++", "g++", "clang++") if os.name == "posix" else ("cl", "clang++", "g++")
# Cards that compute float64 at half the speed of float32; others do at a 32nd or a 64th.
FAST_FLOAT64 = {(8, 0), (9, 0), (10, 0)}
RAN_ON = {(9, 0)}  # compute capabilities of the cards that the kernels have run on


@dataclass(frozen=True)
class Card:
    """A CUDA device; `refused` is the reason why the Triton kernels do not run on it, or None."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    refused: str | None


@dataclass(frozen=True)
class Report:
    """All that `python -m fluxkernels` prints.

    Attributes:
        versions: name and version of what matters here; None for what is not installed.
        runs_on: backend of the automatic choice per kind of device, or the reason why there is none.
        notes: what is known to be slow, untested or wrong on this machine, one sentence each.
        environment: our variables that are set.
        caches: folder per cache.
        checks: the self-check, or None if it was not asked for.
    """

    versions: dict[str, str | None]
    threads: int
    instruction_set: str | None
    backends: list[Backend]
    runs_on: dict[str, str]
    cards: list[Card]
    notes: list[str]
    environment: dict[str, str]
    caches: dict[str, str]
    checks: list[selfcheck.Check] | None

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks or ())

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(self)
        for row, backend in zip(data["backends"], self.backends, strict=True):
            row["available"] = backend.available
        for row, check in zip(data["checks"] or [], self.checks or [], strict=True):
            row["passed"] = check.passed
        return {**data, "healthy": self.healthy}


def compiler() -> str | None:
    """First line that the C++ compiler of this machine prints about itself, or None if there is none."""
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]) is None:
            continue
        arguments = command if command[0] == "cl" else [*command, "--version"]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            continue
        lines = (done.stdout or done.stderr).strip().splitlines()
        if lines and (done.returncode == 0 or command[0] == "cl"):
            return lines[0].strip()
    return None


def triton_version() -> str | None:
    """Version of Triton, without importing it, which takes a second; None if it is not installed."""
    if (module := sys.modules.get("triton")) is not None:
        return str(getattr(module, "__version__", "unknown"))
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _versions() -> dict[str, str | None]:
    return {
        "fluxkernels": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "Triton": triton_version(),
        "NumPy": importlib.metadata.version("numpy"),
        "CUDA": torch.version.cuda,
        "compiler": compiler(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cards(rows: dict[str, Backend]) -> list[Card]:
    found = []
    for index in range(torch.cuda.device_count()):
        reasons = [*rows["triton"].refused, *(rows["triton"].missing or "").split("; ")]
        refused = next((reason for reason in reasons if reason.startswith(f"cuda:{index},")), None)
        properties = torch.cuda.get_device_properties(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Card(name, capability, properties.total_memory, refused))
    return found


def _runs_on() -> dict[str, str]:
    """Backend of the automatic choice per kind of device."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("cpu", "cuda"):
            try:
                found[kind] = resolve_backend(None, kind)
            except (ValueError, BackendError) as error:  # the environment names a backend that cannot run
                found[kind] = f"none, {error}"
    return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _interpreter_fault(triton: str, numpy: str | None) -> str | None:
    if cards.release(triton) >= (3, 7) or numpy is None or _release(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} fails with NumPy {numpy}: pip install 'triton>=3.7' or 'numpy<2.4'"


def _notes_on_software(versions: dict[str, str | None]) -> list[str]:
    notes = []
    oldest, newest = map(_release, TESTED_TORCH)
    if not oldest <= _release(torch.__version__) <= newest:
        notes.append(f"PyTorch {torch.__version__} is untested: the tests ran with {' to '.join(TESTED_TORCH)}")
    triton, on_gpu = versions["Triton"], torch.cuda.is_available()
    if triton is None and on_gpu:
        notes.append("CUDA tensors run on the slower torch backend without Triton: pip install triton")
    elif triton is not None and (reason := cards.too_old(triton)) is not None:
        notes.append(reason)
    elif triton is not None and environment.INTERPRETED and (fault := _interpreter_fault(triton, versions["NumPy"])):
        notes.append(fault)
    if versions["compiler"] is None:
        need = "Triton needs one when a kernel is launched for the first time, and so does " if on_gpu else ""
        notes.append(f"no C++ compiler was found: {need}an installation from source, for the cpu backend")
    if unknown := [name for name in environment.variables_set() if name not in environment.VARIABLES]:
        notes.append(f"nothing reads the environment variable {', '.join(unknown)}: is it misspelled?")
    if os.environ.get(ENVIRONMENT):
        notes.append(f"{ENVIRONMENT} overrides the automatic choice of a backend")
    return notes


def _notes_on_cards(found: list[Card]) -> list[str]:
    notes = [f"{card.refused}; its tensors run on the slower torch backend" for card in found if card.refused]
    for name, capability in {card.name: card.capability for card in found if not card.refused}.items():
        if capability not in FAST_FLOAT64:
            notes.append(f"{name} computes float64 slowly, which rows take that exact integers cannot settle")
        if capability not in RAN_ON:
            number = ".".join(map(str, capability))
            notes.append(f"the kernels are compiled for compute capability {number} in tests; they have not run on it")
    return notes


def examine(check: bool = True) -> Report:
    """Examine this installation.

    Args:
        check: whether to run the self-check, some seconds.
    """
    rows = backends()
    versions, found = _versions(), _cards(rows)
    return Report(
        versions=versions,
        threads=torch.get_num_threads(),
        instruction_set=cpu.describe() if rows["cpu"].available else None,
        backends=list(rows.values()),
        runs_on=_runs_on(),
        cards=found,
        notes=[*_notes_on_software(versions), *_notes_on_cards(found)],
        environment=environment.variables_set(),
        caches={
            "layouts of Triton kernels, FLUXKERNELS_CACHE": str(environment.CACHE),
            "compiled Triton kernels, TRITON_CACHE_DIR": str(environment.triton_cache()),
        },
        checks=selfcheck.run() if check else None,
    )
