"""Instructions in the loops of Triton kernels, counted in machine code that is compiled without a GPU.

Launches are recorded on tensors without data, and compiled with the specializations of a real launch: addresses and
integers divisible by 16, and integers equal to 1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

DISASSEMBLER = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the values of its arguments by name, its grid and the options of the compiler."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]

    def compiled(self, capability: int) -> Any:
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes = {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                signature[name] = "fp32"
            if name not in constants and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches of kernels instead of running them; new tensors have no data meanwhile."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel, arguments, grid, options))

    not_capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
    with mock.patch.object(JITFunction, "run", record), not_capturing, torch.device("meta"):
        yield launches


class MachineCode:
    """Instructions of a compiled kernel with their addresses; `usage` of registers and stack, in bytes, by a thread."""

    def __init__(self, compiled: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(compiled.asm["cubin"])
            done = subprocess.run([DISASSEMBLER, "-sass", file], capture_output=True, text=True, check=True)
            used = subprocess.run([DISASSEMBLER, "-res-usage", file], capture_output=True, text=True, check=True)
        self.usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", used.stdout)}
        found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", done.stdout, re.MULTILINE)
        self.addresses = [int(address, 16) for address, _ in found]
        self.instructions = [text.strip() for _, text in found]

    @cached_property
    def loops(self) -> list[list[str]]:
        """Instructions of every loop that contains no other, in the order of the code."""
        places = {address: i for i, address in enumerate(self.addresses)}
        spans = []
        for end, text in enumerate(self.instructions):
            jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            start = places.get(int(jump[1], 16)) if jump else None
            if start is not None and start < end:
                spans.append((start, end))
        inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
        return [self.instructions[a : b + 1] for a, b in inner]


def opcode(instruction: str) -> str:
    """Operation of an instruction with its modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def classes(instructions: list[str]) -> Counter[str]:
    """Number of instructions by operation."""
    return Counter(opcode(instruction).split(".")[0] for instruction in instructions)


def in_float64(instruction: str) -> bool:
    """Whether an instruction computes in float64 or converts to it."""
    return re.match(r"D(FMA|MUL|ADD|SETP|MMA|SET|MNMX)\b|\w+\.\S*\bF64\b|MUFU\.\S*64", opcode(instruction)) is not None
