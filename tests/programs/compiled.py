"""Compile every Triton kernel for NVIDIA targets without a GPU; print the resources, one JSON line per compilation.

    python -m tests.programs.compiled 90 [PART PARTS]     every PARTS-th one, from PART on

All dtypes for sm_90; float32 and the last variant of each kernel for other targets. It needs a process without
TRITON_INTERPRET, which prevents compilation.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fluxkernels import triton_kernels
from fluxkernels.triton_kernels.gram import host as gram
from fluxkernels.triton_kernels.launch import LAYOUTS, OPTIONS, accumulator, rows, triton_type, warps
from fluxkernels.triton_kernels.streaming import host as streaming

Constants = dict[str, Any]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# Arguments by type. Other pointers have the dtype of the points, other arguments are integers.
RESULTS = {"out", "mean", "log_density"}
INTEGERS = {"N", "M", "D", "E", "V", "steps", "noises", "span", "splits", "elements"}
WIDE = {"sigma2", "tau", "packed"}  # float32, or float64 for points in float64
# Kernels of streaming/ that write or read packed numbers, with the kernel that reads them.
READERS = {
    "kde_backward_queries_kernel": streaming.kde_backward_refs_kernel,
    "kde_backward_refs_kernel": streaming.kde_backward_refs_kernel,
    "transition_ends_kernel": streaming.transition_average_kernel,
    "transition_average_kernel": streaming.transition_average_kernel,
}
DOUBLE = {
    "products", "distances", "coefficients", "first_weights", "of_point", "of_field", "along", "g_sigma2", "weights",
}  # fmt: skip


def kind_of(name: str, kernel: Any, element: str) -> str:
    """Type of an argument in Triton's notation."""
    in_gram = kernel in gram.KERNELS
    if name == "seed":
        return "*i64"
    if name in WIDE or (name == "g_sigma2" and not in_gram):
        return "*fp64" if element == "fp64" else "*fp32"
    if in_gram and (name in DOUBLE or (kernel is gram.gather_kernel and name == "out")):
        return "*fp64"
    if in_gram and element == "bf16" and not (name in RESULTS or name.endswith("_out")):
        element = "fp32"  # half precision is converted before
    # Strides are called x_n, s_b, noise_k, ...
    return "i32" if name in INTEGERS or re.fullmatch(r"([a-z]{1,2}|noise)_[bnmdk]", name) else f"*{element}"


def variants(kernel: Any) -> list[Constants]:
    both = (False, True)
    passes = [{"PASS": p, "SEEDED": s} for p in both for s in both]
    return {
        "langevin_kernel": passes,
        "transition_ends_kernel": [{"COUNT": c} for c in (2, streaming.MOST_VALUES)],
        "transition_average_kernel": [{"COUNT": c} for c in (2, streaming.MOST_VALUES)],
        "normal_kernel": [{"STREAM": 0, "BLOCK": 1024}],
        "products_kernel": [{"CENTERED": c, "MOVED": m} for c, m in ((True, False), (True, True), (False, False))],
        "weights_kernel": [{"MOVED": m, "KDE": not m, "DEPTH": 512} for m in both],
        "moments_kernel": [{"RESIDUAL": r} for r in both],
        "combine_kernel": [{"KDE": k} for k in both],
        "gather_kernel": [{"BOTH": b} for b in both],
        "stack_kernel": [{**p, "WHOLE": w} for p in passes for w in both if p["SEEDED"] or w],
        "chain_kernel": [{"PASS": p} for p in both],
        "rebuild_kernel": [{**p, "WHOLE": w} for p in passes for w in both if p["SEEDED"] or w],
    }.get(kernel.__name__, [{}])


def cases(kernel: Any, element: str) -> Iterator[tuple[dict[str, Any], Constants]]:
    """Yield (extra columns of the row, compile-time constants and options) of each compilation of a kernel."""
    dtype = TYPES[element]
    last = variants(kernel)[-1]
    for variant in variants(kernel):
        if kernel is triton_kernels.normal_kernel:
            if element != "bf16":  # numbers are drawn in float32 or float64
                yield {}, variant
        elif kernel in streaming.KERNELS:
            # Small D shows the differences between variants; large D needs the most registers.
            for D in (2, 7, 16) if element == "fp32" and variant == last else (2,):
                per_row = streaming.values_per_row(kernel, D, variant.get("COUNT", 0))
                fixed = {"D": D, "ACC": accumulator(dtype), "ROWS": rows(per_row, dtype), **OPTIONS, **variant}
                if reader := READERS.get(kernel.__name__):
                    fixed["WIDTH"] = streaming.packed_width(reader, D, dtype, variant.get("COUNT", 0))
                # One lane, and several.
                for columns, lanes in {2: LAYOUTS[:3], 7: LAYOUTS[::2], 16: LAYOUTS[::3]}[D]:
                    yield {}, {**fixed, "COLUMNS": columns, "LANES": lanes, "num_warps": warps((columns, lanes))}
        elif kernel in (gram.weights_kernel, gram.moments_kernel):
            yield {}, {**gram.ROW, **variant}
        else:
            for side in (16, 200) if element == "fp32" else (200,):
                yield {"side": side}, {**gram_constants(kernel, side, dtype), **variant}


def gram_constants(kernel: Any, side: int, dtype: torch.dtype) -> Constants:
    sizes, _ = gram._tiles(side, side)
    if kernel is gram.chain_kernel:
        return gram._chain_tiles(side)
    if kernel is gram.rebuild_kernel:
        return {**gram._rebuild_tiles(side, side, dtype), "ACC": accumulator(dtype)}
    if kernel is gram.stack_kernel:
        return {**sizes, "ACC": accumulator(dtype), "DTYPE": triton_type(dtype)}
    return sizes


def resources(compiled: Any, capability: int) -> dict[str, Any]:
    """Registers, spills and shared memory, reported by Triton's assembler, and the types of matrix instructions."""
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
        "products": sorted(set(re.findall(r"mma[\w.]*\.((?:tf32|f64|f16|bf16))\b", compiled.asm["ptx"]))),
    }


def compile_kernel(kernel: Any, element: str, constants: Constants, capability: int) -> dict[str, Any]:
    options = {name: value for name, value in constants.items() if name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature = {
        name: "constexpr" if name in constants else kind_of(name, kernel, element) for name in kernel.arg_names
    }
    attributes = {}
    if kernel in streaming.KERNELS:  # their host code makes addresses and strides between groups multiples of 16
        aligned = (name.endswith("_b") or signature[name].startswith("*") for name in kernel.arg_names)
        attributes = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(aligned) if each}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return resources(compiled, capability)


def main() -> None:
    capability, part, parts = map(int, (*sys.argv[1:], 0, 1)[:3])
    every = [
        (kernel, element, row, constants)
        for kernel in triton_kernels.KERNELS
        for element in (TYPES if capability == 90 else ["fp32"])
        for row, constants in cases(kernel, element)
        if capability == 90 or variants(kernel)[-1].items() <= constants.items()
    ]
    for kernel, element, row, constants in every[part::parts]:
        shown = {k: v for k, v in constants.items() if not isinstance(v, tl.dtype)}
        row = {"kernel": kernel.__name__, "element": element, **row, **shown}
        print(json.dumps(row | compile_kernel(kernel, element, constants, capability)), flush=True)


if __name__ == "__main__":
    main()
