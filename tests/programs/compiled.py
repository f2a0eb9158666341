"""Compile the Triton kernels for an NVIDIA GPU without having one; print the resources, one JSON line per compilation.

    python -m tests.programs.compiled 90 [PART PARTS]     every PARTS-th one, from PART on

All kernels for sm_90, in float32 and where float64 has its own in float64; with FLUXKERNELS_TESTS=complete in every
dtype. For other GPUs a score and a pass. It needs a process without TRITON_INTERPRET, which prevents compilation.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from fluxkernels import triton_kernels
from fluxkernels.triton_kernels import launch
from fluxkernels.triton_kernels.fixed_point.host import langevin, products
from fluxkernels.triton_kernels.gram import host as gram
from tests.fluxkernels.complete import COMPLETE
from tests.support.census import Launch, MachineCode, in_float64, opcode, recorded

# (groups, queries, reference points, dimensions): few points, and the minibatch of images.
SMALL, IMAGES = (3, 33, 65), (1, 128, 128)
MULTIPROCESSORS = 132
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def calls(dtype: torch.dtype, sizes: tuple[int, int, int], D: int) -> dict[str, Callable[[], object]]:
    """Functions of the backend on tensors without data, by name."""
    B, N, M = sizes
    wide = torch.promote_types(dtype, torch.float32)
    x, refs, field = (
        torch.empty(B, N, D, dtype=dtype),
        torch.empty(B, M, D, dtype=dtype),
        torch.empty(B, N, D, dtype=dtype),
    )
    per_query, per_group = torch.empty(B, N, dtype=wide), torch.empty(B, dtype=wide)
    noise, seed = torch.empty(5, B, N, D, dtype=dtype), torch.empty((), dtype=torch.int64)
    of = triton_kernels
    return {
        "kde": lambda: of.kde(x, refs, per_query),
        "flux_pass": lambda: of.flux_pass(x, refs, per_group, per_group, 4, None, seed),
        "flux_pass of noise": lambda: of.flux_pass(x, refs, per_group, per_group, 4, noise, None),
        "langevin_chain": lambda: of.langevin_chain(x, refs, per_group, per_group, 4, None, seed),
        "langevin_chain of noise": lambda: of.langevin_chain(x, refs, per_group, per_group, 4, noise[:4], None),
        "transition_average": lambda: of.transition_average(x, x, x, field, per_group, per_group),
        "transition_weights": lambda: of.transition_weights(x, x, x, per_group, per_group),
        "residual_gradient": lambda: of.residual_gradient(x, field, refs, per_query),
        "residual_gradient with a factor": lambda: of.residual_gradient(x, field, refs, per_query, per_query),
        "kde_backward": lambda: of.kde_backward(field, field, field[..., 0], x, refs, per_query),
        **averages(dtype, sizes, D),
    }


def averages(dtype: torch.dtype, sizes: tuple[int, int, int], D: int) -> dict[str, Callable[[], object]]:
    """`kernel_average` and its derivatives, with nothing beside the points and with everything."""
    B, N, M = sizes
    wide = torch.promote_types(dtype, torch.float32)
    z, refs, values = (torch.empty(B, count, width, dtype=dtype) for count, width in ((N, D), (M, D), (M, 3)))
    per_query, per_ref = torch.empty(B, N, dtype=wide), torch.empty(B, 1, M, dtype=wide)
    logs, average, log_sum = torch.empty(B, M, dtype=wide), torch.empty(B, N, 3, dtype=dtype), per_query.to(dtype)
    plain = z, refs, per_query, None, None, False, "gaussian"
    full = z, refs, per_ref, values, logs, True, "laplace"
    usual = z, refs, per_query, values, logs, False, "gaussian"
    of = triton_kernels
    return {
        "kernel_average": lambda: of.kernel_average(*plain),
        "kernel_average of values with weights": lambda: of.kernel_average(*usual),
        "kernel_average with all options": lambda: of.kernel_average(*full),
        "kernel_average_backward": lambda: of.kernel_average_backward(z, z, log_sum, *plain),
        "kernel_average_backward of values with weights": lambda: of.kernel_average_backward(
            average[..., :0], average, log_sum, *usual
        ),
        "kernel_average_backward with all options": lambda: of.kernel_average_backward(
            average[..., :0], average, log_sum, *full
        ),
    }


Problem = tuple[torch.dtype, tuple[int, int, int], int, list[str] | None]


def problems(capability: int) -> Iterator[Problem]:
    """Yield (dtype, sizes, dimensions, names of functions or None for all)."""
    few = ["kde", "flux_pass"]
    if capability != 90:
        yield torch.float32, SMALL, 2, few
        yield torch.float32, IMAGES, 3072, few
        yield torch.float64, IMAGES, 200, few
        return
    yield torch.float32, SMALL, 2, None
    yield (
        torch.float32,
        SMALL,
        16,
        [*few, "transition_average", "kde_backward", "kernel_average of values with weights"],
    )
    yield torch.float32, SMALL, 17, None
    if COMPLETE:
        yield torch.float32, IMAGES, 3072, few
        yield torch.bfloat16, SMALL, 2, few
        yield torch.bfloat16, SMALL, 200, ["kde"]
        yield torch.float64, SMALL, 2, few
    yield torch.float64, SMALL, 200, [*few, "kde_backward", "transition_average", "kernel_average with all options"]
    yield torch.float64, SMALL, 200, ["kernel_average_backward with all options"]


def record(processors: int, wanted: Iterable[Problem], capability: int) -> None:
    """Launch all kernels of the problems, as for a GPU with so many multiprocessors."""
    many = {"multiprocessors": lambda device: processors}
    with (
        mock.patch.multiple(products, **many, shared_memory=lambda device: SHARED_MEMORY[capability]),
        mock.patch.multiple(langevin, **many),
        mock.patch.multiple(gram, **many),
        mock.patch.object(launch, "layouts", return_value=launch.LAYOUTS[:1]),
    ):
        for dtype, sizes, D, names in wanted:
            for name, call in calls(dtype, sizes, D).items():
                if names is None or name in names:
                    call()


def launches(capability: int) -> Iterator[Launch]:
    """Yield every launch that is compiled anew: those of few points, then those that fill the GPU."""
    seen = set()
    with recorded() as found:
        record(MULTIPROCESSORS, problems(capability), capability)
        record(1, [(torch.float32, SMALL, 17, ["kde", "flux_pass"])], capability)
    for each in found:
        constants = {p.name for p in each.kernel.params if p.is_constexpr}
        kinds = {
            name: value.dtype if isinstance(value, torch.Tensor) else value
            for name, value in each.arguments.items()
            if isinstance(value, torch.Tensor) or name in constants
        }
        key = each.kernel.__name__, str(kinds), str(each.options)
        if key not in seen:
            seen.add(key)
            yield each


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, stack and its use in loops (spills), shared memory, types of matrix instructions, float64 in loops."""
    code = MachineCode(compiled)
    return {
        "registers": code.usage["REG"],
        "stack": code.usage["STACK"],
        "spills in loops": sum(opcode(text).startswith(("LDL", "STL")) for loop in code.loops for text in loop),
        "shared": compiled.metadata.shared,
        "products": sorted(set(re.findall(r"mma[\w.]*\.((?:tf32|f64|f16|bf16|s8))\b", compiled.asm["ptx"]))),
        "float64 in loops": sum(in_float64(text) for loop in code.loops for text in loop),
    }


def main() -> None:
    capability, part, parts = map(int, (*sys.argv[1:], 0, 1)[:3])
    for each in list(launches(capability))[part::parts]:
        constants = {p.name: each.arguments[p.name] for p in each.kernel.params if p.is_constexpr}
        dtypes = {str(v.dtype) for v in each.arguments.values() if isinstance(v, torch.Tensor)}
        row = {
            "kernel": each.kernel.__name__,
            "package": each.kernel.fn.__module__.split(".")[2],
            "dtypes": sorted(dtypes),
            **{name: str(value) for name, value in constants.items()},
        }
        print(json.dumps(row | resources(each.compiled(capability))), flush=True)


if __name__ == "__main__":
    main()
