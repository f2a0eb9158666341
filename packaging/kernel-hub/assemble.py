"""Assemble the package for the Hugging Face kernel hub: the ops with the backends `torch` and `triton`.

    python packaging/kernel-hub/assemble.py OUTPUT

A kernel of the hub is imported under a name that its version makes unique, from a folder outside of PYTHONPATH. So
imports become relative, and ops are registered in a namespace that the hub chooses.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "fluxkernels"
NAME = "fluxkernels"
# The command `python -m fluxkernels`, which a package under another name does not have.
LEFT_OUT = {"__main__.py", "doctor.py", "selfcheck.py"}
COPIED = ("CARD.md", "build.toml", "flake.nix", "tests")

IMPORT = re.compile(r"^( *)from fluxkernels(\.[\w.]+)? import ", flags=re.MULTILINE)
COMPILED = "import fluxkernels.cpu._kernels as _kernels"
NAMESPACE = 'f"fluxkernels::{name}"'
# Anything else that would find the package by its own name.
ABSOLUTE = re.compile(r"^\s*(?:import|from) fluxkernels|[\"']fluxkernels(?:\.|::)", flags=re.MULTILINE)


def relative(text: str, depth: int) -> str:
    """Source of a module with relative imports; `depth` counts the packages around it inside of `fluxkernels`."""
    dots = "." * (depth + 1)
    return IMPORT.sub(lambda found: f"{found[1]}from {dots}{(found[2] or '').lstrip('.')} import ", text)


def adapted(path: Path) -> str:
    """Source of a module as the hub needs it.

    Raises:
        ValueError: it has an absolute import, or registers an op in a namespace of its own.
    """
    place = path.relative_to(SOURCE)
    text = relative(path.read_text(encoding="utf-8"), len(place.parts) - 1)
    if place.as_posix() == "ops/registration.py":
        text = text.replace(NAMESPACE, "add_op_namespace_prefix(name)")
        text = text.replace("import torch\n", "import torch\nfrom .._ops import add_op_namespace_prefix\n", 1)
    if place.as_posix() == "cpu/host.py":
        text = text.replace(COMPILED, "raise ImportError('the kernel hub has none; pip install fluxkernels')")
    if place.as_posix() == "version.py":
        text = f'"""The version of the source."""\n\n__version__ = "{version()}"\n'
    # The docstrings of modules show how the package of PyPI is imported.
    if found := ABSOLUTE.search(text.replace(">>> from fluxkernels", "")):
        raise ValueError(f"assemble: {place} must name no module absolutely, got {found[0].strip()!r}")
    return text


def version() -> str:
    done = subprocess.run(["git", "describe", "--tags", "--always"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def assemble(output: Path) -> list[Path]:
    """Write the package into a folder that must not exist; return its modules."""
    if output.exists():
        raise SystemExit(f"assemble: OUTPUT must not exist, got {output}")
    modules = [path for path in sorted(SOURCE.rglob("*.py")) if path.name not in LEFT_OUT]
    written = []
    for path in modules:
        target = output / "torch-ext" / NAME / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(adapted(path), encoding="utf-8")
        written.append(target)
    for name in COPIED:
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copyfile
        copy(HERE / name, output / name)
    shutil.copyfile(ROOT / "LICENSE", output / "LICENSE")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    output = parser.parse_args().output
    print(f"{len(assemble(output))} modules in {output}")


if __name__ == "__main__":
    main()
