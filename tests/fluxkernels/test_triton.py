"""Tests of the Triton kernels: interpreted on a CPU, natively on a GPU, and compiled for NVIDIA GPUs on both.

The interpreter needs an environment variable before the kernels are imported, so they run in separate processes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROCESSES = min(8, os.cpu_count() or 1)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(module: str, arguments: Sequence[object], environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run a module and return the JSON lines that it prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_in_parts(module: str, *arguments: object, **environment: str) -> list[dict[str, Any]]:
    """Run a module in several processes, each with a part of the work."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = [pool.submit(run, module, (*arguments, k, PROCESSES), environment) for k in range(PROCESSES)]
        return [row for part in parts for row in part.result()]


def test_every_case_against_the_formulas_in_float64() -> None:
    """Forward, backward, seeds; tests/programs/interpreted.py does the comparisons."""
    on_gpu = torch.cuda.is_available()
    # The layouts are tested one by one; autotuning every case on a GPU would compile for minutes.
    rows = run_in_parts("tests.programs.interpreted", TRITON_INTERPRET="0" if on_gpu else "1", FLUXKERNELS_AUTOTUNE="0")
    assert len(rows) > 50
    wrong = {
        (row["case"], row["dtype"], op): error
        for row in rows
        for op, error in row["errors"].items()
        if not error < row["limit"]
    }
    assert wrong == {}


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_nvidia_gpus(capability: int) -> None:
    """Almost nothing spills, shared memory suffices, and all products are in float64."""
    rows = run_in_parts("tests.programs.compiled", capability, TRITON_INTERPRET="0")
    assert {row["kernel"] for row in rows} >= {"kde_kernel", "langevin_kernel", "products_kernel", "chain_kernel"}
    largest = {80: 163, 90: 227}[capability] * 1024
    # Bytes per thread: every release of the assembler spills a few words.
    assert [row for row in rows if row["spills"] > 64 or row["shared"] > largest] == []
    in_products = {row["kernel"]: row["products"] for row in rows if row["products"]}
    assert set(in_products) == {
        "products_kernel", "combine_kernel", "gather_kernel", "stack_kernel", "chain_kernel", "rebuild_kernel"
    }  # fmt: skip
    assert all(types == ["f64"] for types in in_products.values())
