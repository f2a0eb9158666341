"""Launch kernels: on the right device, in the right type, and in the fastest of a few layouts, as measured."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxkernels.version import __version__

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# "0" takes the layout that a rule of thumb prefers: others are not tried, and results are equal bit for bit on every
# GPU of the same model.
AUTOTUNE = os.environ.get("FLUXKERNELS_AUTOTUNE", "1") != "0"
CACHE = Path(os.environ.get("FLUXKERNELS_CACHE") or os.path.expanduser("~/.cache/fluxkernels"))
# Fused multiply-adds, which later releases of Triton disable by default.
OPTIONS = {"enable_fp_fusion": True}
# (queries, lanes) of a program of streaming/; their product is its number of threads.
LAYOUTS = ((128, 1), (32, 4), (32, 8))


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton type that a kernel computes in."""
    return triton_type(wide(dtype))


def triton_type(dtype: torch.dtype) -> Any:
    """Triton type of the same name."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; interpreted kernels assume a small GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@contextmanager
def on_device_of(t: Tensor) -> Iterator[None]:
    """Launch kernels on the device of `t`, which need not be the current device."""
    if t.is_cuda:
        with torch.cuda.device(t.device):
            yield
    else:
        yield


def rows(values_per_row: int, dtype: torch.dtype) -> int:
    """Rows of a tile: a thread keeps the values of all rows in registers."""
    registers = values_per_row * (3 if dtype == torch.float64 else 1)  # two per number, and temporaries
    return next(rows for rows in (16, 8, 4, 2, 1) if rows == 1 or rows * registers <= 64)


def layouts(queries: int, groups: int, refs: int, device: torch.device) -> list[tuple[int, int]]:
    """The entries of LAYOUTS that suit a problem, the preferred one first.

    With few queries, lanes share the reference points, so that there are threads for the whole GPU.
    """
    threads = 512 * multiprocessors(device)
    fitting = [layout for layout in LAYOUTS if layout[1] == 1 or 4 * layout[1] <= refs]
    preferred = next((layout for layout in fitting if queries * groups * layout[1] >= threads), fitting[-1])
    return sorted(fitting, key=lambda layout: layout != preferred)


def launch_streaming(
    kernel: Any,
    arguments: Sequence[Any],
    points: Tensor,
    queries: int,
    refs: int,
    values_per_row: int,
    more: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """Launch a kernel of streaming/ for `queries` queries and `refs` reference points per group.

    Args:
        points: `[groups, ..., D]`; their groups, dimension and dtype are those of the problem.
        values_per_row: numbers that the kernel keeps per row of its tiles.
        more: further axes of the grid.
        constants: the kernel's own compile-time arguments.
    """
    groups, D = points.shape[0], points.shape[-1]
    fixed = {
        "D": D,
        "ACC": accumulator(points.dtype),
        "ROWS": rows(values_per_row, points.dtype),
        **OPTIONS,
        **constants,
    }

    def run(layout: tuple[int, int]) -> None:
        columns, lanes = layout
        grid = (triton.cdiv(queries, columns) * groups, *more)  # only the first axis may exceed 65535
        kernel[grid](*arguments, COLUMNS=columns, LANES=lanes, num_warps=columns * lanes // 32, **fixed)

    sizes = [(size - 1).bit_length() for size in (queries, groups, refs)]
    key = [kernel.__name__, D, str(points.dtype), *sizes, *map(str, constants.values())]
    fastest(" ".join(map(str, key)), layouts(queries, groups, refs, points.device), run)


def fastest(key: str, choices: Sequence[Any], run: Callable[[Any], None]) -> None:
    """Run the fastest of a few choices, which all give the same results.

    The first call with a key times all choices on its own arguments, and saves the fastest in a file for later
    processes. While a CUDA graph is captured nothing can be timed, and an unknown key takes the first choice.
    """
    if len(choices) == 1 or INTERPRETED or not AUTOTUNE:
        return run(choices[0])
    device = torch.cuda.get_device_name()
    known = _known(device)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return run(choices[0])
        seconds = [_seconds(lambda choice=choice: run(choice)) for choice in choices]  # type: ignore[misc]
        known[key] = list(choices[seconds.index(min(seconds))])
        _save(device, known)
    run(next((choice for choice in choices if list(choice) == known[key]), choices[0]))


def _seconds(run: Callable[[], None]) -> float:
    """Least time of a few runs, after one run that compiles."""
    run()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def _file(device: str) -> Path:
    # The version is part of the name, so that kernels of a new release are timed again.
    return CACHE / f"{__version__}-{device.replace(' ', '-')}-triton-{triton.__version__}.json"


@cache
def _known(device: str) -> dict[str, Any]:
    """Choices by key as last saved; callers add to this dictionary."""
    try:
        known = json.loads(_file(device).read_text())
    except (OSError, ValueError):  # no file yet, or an incomplete one
        return {}
    return known if isinstance(known, dict) else {}


def _save(device: str, known: dict[str, Any]) -> None:
    file = _file(device)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=1))
        part.replace(file)
    except OSError:
        pass  # then the next process has to time the choices again
