"""A wheel for every Python found here: built from the sdist, installed into an empty environment, called from another
folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCH = "torch==2.13.0"
WHAT = "wheel built from the sdist, installed into an empty environment and called from outside of the checkout"
CALL = """
import sys, torch, fluxkernels, fluxmatching
for module in (fluxkernels, fluxmatching):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert fluxkernels.backends()["cpu"].available, fluxkernels.backends()["cpu"].missing
target, capability = fluxkernels.cpu._kernels.target(), torch.backends.cpu.get_cpu_capability()
assert target == {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline"), (target, capability)
x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
of_cpu, of_torch = (fluxkernels.kde_score(x, x, 0.5, backend=name) for name in ("cpu", "torch"))
error = ((of_cpu - of_torch).norm() / of_torch.norm()).item()
assert error < 1e-6, error
print(sys.version.split()[0], torch.__version__, error)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command, run without this environment's packages; RuntimeError with the last of it if it fails."""
    # The packages of the checkout must not be found by way of PYTHONPATH.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[1:4]))}: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def candidates(version: str) -> Iterator[str | Path]:
    """Possible paths of an interpreter of that version: in PATH, of pyenv, of uv."""
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from (pyenv / "versions").glob(f"{version}.*/bin/python{version}")
    if shutil.which("uv"):
        try:
            yield run("uv", "python", "find", "--system", "--no-python-downloads", version, cwd=Path.home()).strip()
        except RuntimeError:  # uv finds none
            return


def find(version: str) -> str | Path | None:
    """An interpreter that runs: pyenv leaves commands in PATH for versions that are switched off."""
    for python in candidates(version):
        try:
            printed = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])", cwd=Path.home())
        except RuntimeError:
            continue
        if printed.strip() == version:
            return python
    return None


def copy_sources(folder: Path) -> Path:
    """Without what was built in the checkout."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.pyd")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignored))


def new_environment(python: str | Path, folder: Path) -> Path:
    """The interpreter of an empty environment in `folder`."""
    run(python, "-m", "venv", folder / "environment", cwd=folder)
    return folder / "environment" / "bin" / "python"


def build_sdist(folder: Path) -> Path:
    """The archive that is published, from which the wheels are built."""
    inside = new_environment(sys.executable, folder)
    run(inside, "-m", "pip", "install", "--quiet", "build", cwd=folder)
    run(inside, "-m", "build", "--sdist", "--outdir", folder, copy_sources(folder), cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def install_and_call(python: str | Path, torch: str, sdist: Path, folder: Path) -> str:
    """Output of CALL in an empty environment."""
    inside = new_environment(python, folder)
    pip = (inside, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "-w", folder, sdist, cwd=folder, FLUXKERNELS_CPU="require")
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--quiet", *shlex.split(torch), cwd=folder)
    run(*pip, "install", "--quiet", wheel, cwd=folder)
    return run(inside, "-W", "error", "-c", CALL, cwd=folder)


def check(pythons: Sequence[str] = PYTHONS, torch: str = TORCH, fetch: bool = False) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as name:
        sdist = build_sdist(Path(name))
        for version in pythons:
            print(f"Python {version}", flush=True)
            found[version] = measure(version, torch, sdist, fetch)
    if all("skipped" in entry for entry in found.values()):
        return {"skipped": f"no Python {' or '.join(pythons)} was found"}
    return {"passed": not any("failed" in entry for entry in found.values()), "torch": torch, "pythons": found}


def measure(version: str, torch: str, sdist: Path, fetch: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        try:
            if fetch and find(version) is None:
                run("uv", "python", "install", version, cwd=Path.home())
            if (python := find(version)) is None:
                return {"skipped": "not found"}
            python_version, torch_version, error = install_and_call(python, torch, sdist, Path(folder)).split()
        except RuntimeError as problem:
            return {"failed": str(problem)}
    seconds = round(time.perf_counter() - begin)
    return {"python": python_version, "torch": torch_version, "error": float(error), "seconds": seconds}


def describe(entry: dict[str, Any]) -> str:
    def cell(found: dict[str, Any]) -> str:
        return found.get("skipped") or ("failed" if "failed" in found else "installed and ran")

    return "Python " + ", ".join(f"{version} {cell(found)}" for version, found in entry["pythons"].items())
