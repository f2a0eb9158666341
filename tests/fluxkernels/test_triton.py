"""Tests of the Triton kernels: interpreted on a CPU, natively on a GPU, and compiled for NVIDIA GPUs on both.

The interpreter needs an environment variable before the kernels are imported, so they run in separate processes.
"""

import importlib.util

import pytest
import torch

from tests.support.processes import run_in_parts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


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
