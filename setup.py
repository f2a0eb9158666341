"""Packages and the compiled module of the cpu backend. Everything else is in pyproject.toml.

FLUXKERNELS_CPU controls the C++ of csrc/. Unset: it is compiled; if that fails, the installation continues without it,
and the cpu backend reports that it is missing. `require`: a failure stops the installation. `0`: it is not compiled.
FLUXKERNELS_SANITIZE=1 compiles it with the address and undefined-behavior sanitizers (`make sanitize`).
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = os.environ.get("FLUXKERNELS_CPU", "")
if CPU not in ("", "0", "require"):
    raise SystemExit(f"FLUXKERNELS_CPU must be unset, 'require' or '0', got {CPU!r}")
SANITIZE = os.environ.get("FLUXKERNELS_SANITIZE") == "1"
CSRC = Path("csrc")


class BuildKernels(build_ext):
    """Build the module; raise CompileError for MSVC, after which an installation continues without the module."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise CompileError("csrc/ needs GCC or Clang: MSVC has no vector types")
        # If this build fails, the package is installed without the module: an older one must not take its place.
        for built in (self.get_ext_fullpath(ext.name), str(Path(self.build_lib, self.get_ext_filename(ext.name)))):
            Path(built).unlink(missing_ok=True)
        super().build_extension(ext)


def kernels() -> list[Extension]:
    if CPU == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if CPU == "require":
            raise
        return []
    linux = sys.platform == "linux"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
    macros: list[tuple[str, str | None]] = [("FLUX_SANITIZED", None)] if SANITIZE else []
    options: dict[str, Any] = {
        "include_dirs": [pybind11.get_include()],
        "define_macros": macros,
        "libraries": ["dl"] if linux else [],
        "extra_compile_args": [
            *("-std=c++17", "-pthread", "-Wall", "-Wextra"),
            "-fno-math-errno",  # errno of a square root is never read
            "-fvisibility=hidden",
            *(["-O1", "-g", *sanitizers] if SANITIZE else ["-O3", "-g0"]),
        ],
        "extra_link_args": ["-pthread", *sanitizers, *(["-Wl,--strip-all"] if linux and not SANITIZE else [])],
        "language": "c++",
    }
    sources = sorted(str(p) for p in CSRC.rglob("*.cpp"))
    depends = sorted(str(p) for p in CSRC.rglob("*.h"))
    return [
        Extension("fluxkernels.cpu._kernels", sources, depends=depends, optional=CPU != "require", **options),
    ]


setup(
    packages=[
        *find_packages(include=["fluxkernels", "fluxkernels.*"]),
        *find_packages("python_api", include=["fluxmatching", "fluxmatching.*"]),
    ],
    package_dir={"fluxkernels": "fluxkernels", "fluxmatching": "python_api/fluxmatching"},
    package_data={
        "fluxkernels": ["py.typed", "MATH.md"],
        "fluxkernels.cpu": ["*.pyi"],
        "fluxmatching": ["py.typed", "example_models/*/*"],
    },
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
)
