"""The Triton kernels: under Triton's interpreter on a CPU, natively where there is a GPU; compiled for both anyway.

The interpreter needs an environment variable before the kernels are imported, hence the processes of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The JSON lines that a module prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_case_against_the_formulas_in_float64() -> None:
    """Forward, backward, seeds: tests/fluxkernels/interpreted.py says what is compared."""
    rows = run("tests.fluxkernels.interpreted", TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")
    assert len(rows) > 50
    wrong = {
        (row["case"], row["dtype"], op): error
        for row in rows
        for op, error in row["errors"].items()
        if not error < row["limit"]
    }
    assert wrong == {}


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_nvidia_gpus(capability: str) -> None:
    """Without spills, within the shared memory of the architecture, without tf32 products in a logit."""
    rows = run("tests.fluxkernels.compiled", capability, TRITON_INTERPRET="0")
    assert {row["kernel"] for row in rows} >= {"kde_kernel", "langevin_kernel", "transition_average_kernel"}
    largest = {"80": 163, "90": 227}[capability] * 1024
    # The assembler sets a few words aside of its own accord, while registers are left; bytes a thread.
    assert [row for row in rows if row["spills"] > 16 or row["shared"] > largest] == []
    assert [row for row in rows if row["tf32"]] == []
