"""Grids and block sizes of the kernels, the device they run on, and what Triton needs to run at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Queries a program holds, one a thread and column: see streaming.py.
COLUMNS, WARPS = 128, 4


def accumulator(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float64 for float64, float32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def blocks(numbers: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes of a kernel, as keyword arguments.

    Args:
        numbers: what a kernel loads of every row of its tiles. A thread holds all rows, in registers.
        dtype: of the points.
    """
    registers = numbers * (3 if dtype == torch.float64 else 1)  # two a number, and temporaries
    most = next(rows for rows in (16, 8, 4, 2, 1) if rows == 1 or rows * registers <= 64)
    # Fused multiply-adds, which later releases of Triton leave out unless asked for.
    return {"ROWS": most, "COLUMNS": COLUMNS, "num_warps": WARPS, "enable_fp_fusion": True}


def grid(columns: int, groups: int, *more: int) -> tuple[int, ...]:
    """Programs for `columns` entries of each group; the first axis of a grid alone takes more than 65535."""
    return triton.cdiv(columns, COLUMNS) * groups, *more


@contextmanager
def on_device_of(t: Tensor) -> Iterator[None]:
    """Launches go to the device of `t`, which need not be the current one."""
    if t.is_cuda:
        with torch.cuda.device(t.device):
            yield
    else:
        yield
