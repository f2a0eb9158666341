"""The kernel tests on C++ compiled with sanitizers of addresses and undefined behavior: `make sanitize` anywhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
# Preloaded because Python itself is not built with them; libstdc++ too, or the first C++ exception would end all.
LIBRARIES = ("libasan.so", "libstdc++.so")
PACKAGES = ("pybind11", "pytest", "setuptools")
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:")
# Inductor starts compilers of its own, which do not run with a sanitizer preloaded; Triton's kernels are not C++.
TESTS = ("tests/fluxkernels", "-k", "not inductor", "--ignore=tests/fluxkernels/test_triton.py")
WHAT = "kernel tests on C++ compiled with the address and undefined-behavior sanitizers"


def library(name: str) -> str:
    """Path at which g++ finds a library; the bare name if it does not."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def missing() -> str | None:
    """Reason why the sanitizers cannot run here, or None."""
    if sys.platform != "linux":
        return f"the sanitizers are preloaded as on Linux, this is {sys.platform}"
    if shutil.which("g++") is None:
        return "there is no g++"
    absent = [f"g++ has no {name}" for name in LIBRARIES if not Path(library(name)).is_absolute()]
    absent += [f"{name} is not installed" for name in PACKAGES if importlib.util.find_spec(name) is None]
    return ", ".join(absent) or None


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def build(folder: Path) -> Path:
    """The packages with sanitized kernels."""
    built = folder / "lib"
    done = run(
        "setup.py", "-q", "build", "--build-lib", str(built), "--build-temp", str(folder / "objects"),
        cwd=ROOT, FLUXKERNELS_CPU="require", FLUXKERNELS_SANITIZE="1",
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the sanitized kernels do not compile: {done.stderr[-2000:]}")
    return built


def count(results: Path) -> dict[str, int]:
    """Tests by outcome in pytest's JUnit file; none where pytest did not live to write it."""
    suites = ElementTree.parse(results).iter("testsuite") if results.exists() else []
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    wrong = totals["failures"] + totals["errors"]
    return {"tests_passed": totals["tests"] - wrong - totals["skipped"], "tests_failed": wrong}


def check(tests: tuple[str, ...] = TESTS) -> dict[str, Any]:
    if reason := missing():
        return {"skipped": reason}
    with TemporaryDirectory() as name:
        folder = Path(name)
        print("compiling", flush=True)
        built = build(folder)
        environment = {
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": " ".join(map(library, LIBRARIES)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        loaded = run("-c", "from fluxkernels.cpu import _kernels; print(_kernels.__file__)", cwd=built, **environment)
        if not loaded.stdout.startswith(str(built)):
            raise RuntimeError(f"not the sanitized kernels were loaded: {loaded.stdout}{loaded.stderr[-2000:]}")
        # Pytest's own capture of file descriptors would lose the report of a process that ends with it.
        print("testing: some minutes", flush=True)
        done = run(
            "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-o", f"pythonpath={built} .",
            f"--junitxml={folder / 'tests.xml'}", *tests, cwd=ROOT, **environment,
        )  # fmt: skip
        counts = count(folder / "tests.xml")
    reports = len(REPORT.findall(done.stderr))
    good = done.returncode == 0 and reports == 0
    output = "" if good else done.stderr[:4000] + done.stdout[-2000:]
    if output:
        print(output, flush=True)
    return {"passed": good and counts["tests_passed"] > 0, **counts, "reports": reports, "output": output}


def describe(entry: dict[str, Any]) -> str:
    return f"{entry['tests_passed']} tests passed, {entry['tests_failed']} failed, {entry['reports']} reports"
