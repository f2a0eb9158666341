"""Compiles every Triton kernel for NVIDIA targets without a GPU and prints what each needs, one JSON line a kernel.

    python -m tests.fluxkernels.compiled 80 90

In a process of its own: where TRITON_INTERPRET is set the kernels cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fluxkernels import triton_kernels
from fluxkernels.triton_kernels.launch import accumulator, blocks

POINTERS = {
    "z", "x_in", "x0", "xt", "refs", "sigma2", "tau", "field", "noise", "shift0", "values", "g_shift", "g_mean",
    "g_log_density", "g_z", "g_refs", "g_sigma2", "shift", "mean", "log_density", "gradient", "x0_out", "shift0_out",
    "xt_out", "shift_t_out", "weights", "average",
}  # fmt: skip
STATISTICS = {"statistics"}
DIMENSIONS = (1, 2, 3, 7, 16)
ELEMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
NUMBERS: dict[str, Any] = {
    "kde_backward_refs_kernel": lambda D, variant: 3 * D + 4,
    "transition_average_kernel": lambda D, variant: D + variant["WIDTH"] + 2,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "langevin_kernel": [{"PASS": p, "SEEDED": s} for p in (False, True) for s in (False, True)],
    "transition_ends_kernel": [{"WEIGHTS": w} for w in (False, True)],
    "transition_average_kernel": [{"WIDTH": w} for w in (2, triton_kernels.MOST_VALUES)],
}


def signature(kernel: Any, element: str, constants: dict[str, Any]) -> dict[str, str]:
    accumulator = "*fp64" if element == "fp64" else "*fp32"

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "seed":
            return "*i64"
        if name in ("sigma2", "tau", "g_sigma2", *STATISTICS):
            return accumulator
        if name in POINTERS or name == "out":
            return f"*{element}"
        return "fp32" if name == "log_count" else "i32"

    return {name: kind(name) for name in kernel.arg_names}


def resources(compiled: Any, capability: int) -> dict[str, Any]:
    """Registers, spills and shared memory, as the assembler in Triton's package reports them."""
    architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(compiled.asm["ptx"])
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file, "-o", file.with_suffix(".cubin")],
            capture_output=True,
            text=True,
            check=True,
        )

    def number(before: str) -> int:
        (found,) = re.findall(rf"(\d+) {before}", done.stderr)
        return int(found)

    return {
        "registers": number("registers"),
        "spills": number("bytes spill stores"),
        "shared": compiled.metadata.shared,
        "tf32": bool(re.search(r"mma[\w.]*tf32", compiled.asm["ptx"])),
    }


def compile_kernel(kernel: Any, element: str, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    source = ASTSource(fn=kernel, signature=signature(kernel, element, constants), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return resources(compiled, capability)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for kernel in triton_kernels.KERNELS:
            name = kernel.__name__
            for variant in VARIANTS.get(name, [{}]):
                for element, dtype in ELEMENTS.items():
                    for D in DIMENSIONS if dtype == torch.float32 else (2,):
                        numbers = NUMBERS[name](D, variant) if name in NUMBERS else D
                        constants = {"D": D, "ACC": accumulator(dtype), **blocks(numbers, dtype), **variant}
                        row = {"kernel": name, "element": element, "D": D, **variant, "rows": constants["ROWS"]}
                        print(json.dumps(row | compile_kernel(kernel, element, constants, capability)), flush=True)


if __name__ == "__main__":
    main()
