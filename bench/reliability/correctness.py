"""Correctness: random inputs, and every adversarial case with every backend."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from fluxkernels import cpu
from tests.support import accuracy, fuzzing
from tests.support.cases import CASES, Case
from tests.support.processes import run_in_parts
from tests.support.targets import use_target

TRITON = importlib.util.find_spec("triton") is not None
# Implementation, case, number of results, and the errors of those that are wrong by op.
Tried = tuple[str, str, int, dict[str, float]]
RANDOM = "random shapes, strides, dtypes and extreme values: the `cpu` kernels against the formulas in float64"
ADVERSARIAL = (
    "every op on every adversarial case against extended precision; the Triton kernels by Triton's interpreter, on the "
    "cases with few reference points, against the formulas in float64"
)


def of_random_inputs(seconds: float) -> dict[str, Any]:
    """Run `make fuzz`. It has bounds for the cpu backend alone, because it compares with the torch backend."""
    if reason := cpu.missing():
        return {"skipped": f"the cpu backend cannot run: {reason}"}
    with tqdm(itertools.count(), desc="inputs", mininterval=1) as bar:
        report = fuzzing.run(seed=0, cases=iter(bar), seconds=seconds)
    return {
        "passed": report.problems > 0 and not report.failures,
        "backend": "cpu",
        "targets": cpu._kernels.targets(),
        "seconds": seconds,
        "inputs": report.problems,
        "calls": report.calls,
        "compared": report.compared / max(1, report.entries),
        "worst_roundings": report.worst,
        "failures": report.failures[:40],
        "failures_in_all": len(report.failures),
    }


def describe_random(entry: dict[str, Any]) -> str:
    return (
        f"{entry['inputs']} inputs, {entry['calls']} calls in {entry['seconds']:g} s: {entry['failures_in_all']} wrong"
    )


def of_cases(cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Results tried and correct: of torch, of cpu with each instruction set, of triton by its interpreter."""
    backends: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for implementation, where, tried, wrong in itertools.chain(compiled(cases), interpreted()):
        figures = backends.setdefault(implementation, {"tried": 0, "passed": 0})
        figures["tried"] += tried
        figures["passed"] += tried - len(wrong)
        failures += [f"{implementation}: {where}, {op}: error {error:.1e}" for op, error in wrong.items()]
    if reason := cpu.missing():
        backends["cpu"] = {"skipped": reason}
    if not TRITON:
        backends["triton"] = {"skipped": "triton is not installed"}
    return {"passed": not failures, "cases": len(cases), "backends": backends, "failures": failures[:40]}


def compiled(cases: Sequence[Case]) -> Iterator[Tried]:
    """Results of torch and cpu, in float32."""
    targets = [] if cpu.missing() else cpu._kernels.targets()
    for case in tqdm(cases, desc="cases"):
        of_torch = accuracy.errors(case, "torch")
        yield "torch", case.name, len(of_torch), accuracy.wrong(case, of_torch, of_torch)
        for target in targets:
            with use_target(target):
                of_cpu = accuracy.errors(case, "cpu")
            yield f"cpu {target}", case.name, len(of_cpu), accuracy.wrong(case, of_cpu, of_torch)


def interpreted() -> Iterator[Tried]:
    """Results of Triton's interpreter, where Triton is installed: derivatives too, against the formulas in float64.

    It is slow and takes cases with few reference points alone, in processes of their own on all cores.
    """
    if not TRITON:
        return
    print("triton by its interpreter: some minutes", flush=True)
    environment = {"TRITON_INTERPRET": "1", "FLUXKERNELS_AUTOTUNE": "0", "CUDA_VISIBLE_DEVICES": ""}
    programs = "tests.programs.interpreted", "tests.programs.averages"
    for row in (row for each in programs for row in run_in_parts(each, "all", **environment)):
        wrong = {op: error for op, error in row["errors"].items() if not error < row["limit"]}
        yield "triton, interpreted", f"{row['case']}, {row['dtype']}", len(row["errors"]), wrong


def describe_cases(entry: dict[str, Any]) -> str:
    cells = [
        f"`{name}` {f['skipped']}" if "skipped" in f else f"`{name}` {f['passed']} of {f['tried']}"
        for name, f in entry["backends"].items()
    ]
    return f"{entry['cases']} cases; right: {', '.join(cells)}"
