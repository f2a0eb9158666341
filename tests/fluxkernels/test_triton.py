"""Tests of the Triton kernels: interpreted on a CPU, natively on a GPU, and compiled for NVIDIA GPUs on both.

The interpreter needs an environment variable before the kernels are imported, so they run in separate processes.
"""

import ast
import importlib
import importlib.util
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fluxkernels.complete import COMPLETE, complete_only
from tests.support.processes import run_in_parts

# The cases run once, also where pytest-xdist distributes the tests.
in_one_worker = pytest.mark.xdist_group("cases of Triton kernels")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@cache
def cases() -> list[dict[str, Any]]:
    on_gpu = torch.cuda.is_available()
    # The layouts are tested one by one; autotuning every case on a GPU would compile for minutes.
    environment = {"TRITON_INTERPRET": "0" if on_gpu else "1", "FLUXKERNELS_AUTOTUNE": "0"}
    programs = "tests.programs.interpreted", "tests.programs.averages"
    return [row for each in programs for row in run_in_parts(each, "all" if COMPLETE else "few", **environment)]


@in_one_worker
def test_kernels_agree_with_the_formulas_in_float64() -> None:
    """Forward, backward, seeds; interpreted.py and averages.py in tests/programs have the cases and compare."""
    wrong = {
        (row["case"], row["dtype"], op): error
        for row in cases()
        for op, error in row["errors"].items()
        if not error < row["limit"]
    }
    assert wrong == {}


@in_one_worker
def test_every_kernel_has_a_case() -> None:
    triton_kernels = importlib.import_module("fluxkernels.triton_kernels")
    modules = [module.name for module in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
    kernels = {f"{name}.{kernel}" for name in modules for kernel in kernels_of(name)}
    assert len(kernels) > 30
    assert {kernel for row in cases() for kernel in row["kernels"]} == kernels


def test_no_kernel_takes_a_number_from_itself() -> None:
    """x - x is not 0 where x is a product: a fused multiply-add makes it the product's rounding error."""
    found = [re.findall(r"\b(\w+) - \1\b", source) for source in sources()]
    assert [names for names in found if names] == [["value"]]  # the sentence that says so


def test_no_function_of_a_kernel_returns_a_bare_number() -> None:
    """The compiler makes float32 of one, also where it meets float64; the interpreter keeps all of its digits."""
    parsed = [node for source in sources() for node in ast.walk(ast.parse(source))]
    functions = [node for node in parsed if isinstance(node, ast.FunctionDef) and "triton.jit" in decorators(node)]
    assert len(functions) > 100
    assert [function.name for function in functions if any(is_constant(value) for value in returned(function))] == []


def sources() -> list[str]:
    """Text of every module of the Triton kernels."""
    triton_kernels = importlib.import_module("fluxkernels.triton_kernels")
    found = [path.read_text() for folder in triton_kernels.__path__ for path in Path(folder).rglob("*.py")]
    assert len(found) > 15
    return found


def decorators(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in function.decorator_list]


def returned(function: ast.FunctionDef) -> list[ast.expr]:
    return [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]


def is_constant(value: ast.expr) -> bool:
    """True if an expression has nothing but numbers and compile-time constants, whose names are upper-case."""
    nodes = list(ast.walk(value))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} - {"tl"}
    return all(name.isupper() for name in names) and not any(isinstance(node, ast.Call) for node in nodes)


def kernels_of(module: str) -> list[str]:
    """Names of the kernels that a module defines."""
    found = vars(importlib.import_module(module)).items()
    return [name for name, value in found if name.endswith("_kernel") and value.fn.__module__ == module]


@cache
def compilations(capability: int) -> list[dict[str, Any]]:
    return run_in_parts("tests.programs.compiled", capability, TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=complete_only) for other in (100, 120))])
def test_kernels_compile_for_nvidia_gpus(capability: int) -> None:
    """Loops do not spill, shared memory suffices, and products have the type of their package."""
    rows = compilations(capability)
    assert {row["kernel"] for row in rows} >= {"kde_kernel", "langevin_kernel", "products_kernel", "chain_kernel"}
    largest = {90: 227, 100: 227, 120: 99}[capability] * 1024
    # Bytes per thread: every release of the assembler spills a few words, and two kernels sums outside of their loops.
    spilled = [
        row
        for row in rows
        if row["stack"] > 64 and (row["spills in loops"] or row["kernel"] not in ("products_kernel", "chain_kernel"))
    ]
    assert spilled + [row for row in rows if row["shared"] > largest] == []
    in_products = {(row["package"], row["kernel"]): row["products"] for row in rows if row["products"]}
    float64 = {"gram": ["f64"]} if capability != 120 else {}  # sm_120 has no matrix units for float64
    assert set(in_products) >= {(package, name) for package in float64 for name in ("products_kernel", "chain_kernel")}
    assert in_products["fixed_point", "products_kernel"] == in_products["fixed_point", "chain_kernel"] == ["s8"]
    assert all(types == {"fixed_point": ["s8"], **float64}[package] for (package, _), types in in_products.items())


# Kernels of float32 points that compute in float64 in a loop: over coordinates (conversion to words, results, and the
# one squared distance that a query needs), or for rows that are repaired.
PER_COORDINATE = {
    "extent_kernel", "points_kernel", "chain_extent_kernel", "chain_points_kernel",
    "kde_results_kernel", "derivative_results_kernel", "gathered_results_kernel", "chain_results_kernel",
    "kernel_average_results_kernel",
}  # fmt: skip
REPAIR = {"weights_kernel", "kernel_average_weights_kernel", "moments_kernel", "chain_repair_kernel"}


def test_float32_pairs_cost_no_float64() -> None:
    rows = compilations(90)
    of_float32 = [row for row in rows if row["package"] in ("streaming", "fixed_point")]
    of_float32 = [row for row in of_float32 if "torch.float64" not in row["dtypes"] or row["package"] == "fixed_point"]
    found = {row["kernel"] for row in of_float32 if row["float64 in loops"]}
    assert found <= PER_COORDINATE | REPAIR
    assert {"products_kernel", "chain_kernel", "words_kernel"} <= {row["kernel"] for row in of_float32} - found
