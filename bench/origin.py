"""Origin of a measurement: date, commit, machine and versions. Every result that is kept has one."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fluxkernels import cpu

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Origin:
    """Date, commit and machine of a measurement.

    Attributes:
        date: date in UTC, such as 2030-12-31.
        commit: commit of the checkout, with "-dirty" if files were changed since.
        machine: processor, threads, system and versions; with a GPU, its "card" and properties too.
    """

    date: str
    commit: str
    machine: Mapping[str, Any]

    @classmethod
    def here(cls, device: torch.device | None = None, commit: str | None = None) -> Origin:
        """Describe this moment and machine. `commit` is for a copy without git."""
        machine = cpu_machine() | (gpu_machine(device) if device is not None and device.type == "cuda" else {})
        return cls(today(), commit or checked_out(), machine)

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Origin:
        """Read the origin that kept results have."""
        return cls(results["date"], results["commit"], results["machine"])

    def fields(self) -> dict[str, Any]:
        """The entries that `of` reads."""
        return asdict(self)

    def sentence(self) -> str:
        """Machine, versions and commit; a GPU stands in the processor's place."""
        m = self.machine
        threads = f"{m['threads']} threads" + (f" ({m['thread_source']})" if m.get("thread_source") else "")
        parts = [m["card"]] if "card" in m else [m["cpu"], threads]
        parts += [m["system"], f"Python {m['python']}", f"torch {m['torch']}"]
        for key, name in (("triton", "Triton"), ("cuda", "CUDA"), ("driver", "driver")):
            parts += [f"{name} {m[key]}"] if "card" in m and m.get(key) else []
        if "card" not in m and m.get("target"):
            parts.append(f"instruction set {m['target']}")
        return f"{', '.join(parts)}, commit {self.commit}."

    def dated(self) -> str:
        return f"{self.date}, {self.sentence()}"


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def first_line(*command: str) -> str | None:
    """First line that a program prints, or None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0] or None


def checked_out() -> str:
    return first_line("git", "describe", "--always", "--dirty") or "unknown"


def cpu_machine() -> dict[str, Any]:
    """Processor, threads, system, versions, and how the `cpu` backend uses them."""
    compiled = cpu.missing() is None
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "thread_source": cpu._kernels.thread_source() if compiled else None,
        "target": cpu._kernels.target() if compiled else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """The card, its driver, and the versions of what compiles for it."""
    properties = torch.cuda.get_device_properties(device)
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "card": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": triton,
    }
