"""Launch kernels: on the right device, in the right type, and in the fastest of a few layouts, as measured."""

import json
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxkernels.backend import BackendError
from fluxkernels.environment import AUTOTUNE, CACHE, INTERPRETED
from fluxkernels.version import __version__

# Fused multiply-adds, which later releases of Triton disable by default.
OPTIONS = {"enable_fp_fusion": True}
# (queries, lanes) of a program of streaming/. A thread has a query, or two that share each load.
LAYOUTS = ((128, 1), (256, 1), (32, 4), (32, 8))

# A layout replaces one that the rule of thumb prefers only if it takes less than this share of its time.
MARGIN = 0.97
ROUNDS = 5  # of measurements, of which the least counts
SPAN = 1e-3  # seconds that the launches of one measurement take together
MOST_LAUNCHES = 100  # of one measurement
LONG = 0.1  # seconds of all choices together above which each is measured once
# Cycles that the GPU pauses per launch, so that the host has queued all of them: 50 microseconds at 2 GHz.
PAUSE, LONGEST_PAUSE = 10**5, 2**30


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def widened(*tensors: Tensor) -> list[Tensor]:
    """Convert half precision to float32: products of it do not compile with every release of Triton."""
    return [t.to(wide(t.dtype)) for t in tensors]


def strided(*tensors: Tensor) -> list[Any]:
    """Arguments of a kernel: each tensor, followed by its strides."""
    return [part for t in tensors for part in (t, *t.stride())]


def random_arguments(x: Tensor, noise: Tensor | None, seed: Tensor | None) -> list[Any]:
    """(seed, noise and its strides), where `x` is a placeholder for one of them that is never read."""
    return [x if seed is None else seed, *((x, 0, 0, 0, 0) if noise is None else (noise, *noise.stride()))]


@cache
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


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; interpreted kernels have enough."""
    if device.type != "cuda":
        return 2**20
    # PyTorch's types do not name it; 99 KiB is what the smaller cards have.
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on the device of `t`, which need not be the current device."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


# Triton has one hook for all threads.
_CAPTURE = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the current device.

    Args:
        constants: compile-time arguments and options of Triton.

    Raises:
        BackendError: a CUDA graph is captured, and the kernel would have to be compiled and loaded first. CUDA does not
            permit that, and the capture would fail. It stays valid if the kernel is not launched.
    """
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        with _CAPTURE, _nothing_compiled():
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Raise in place of compiling. Triton calls this hook for a kernel that the device has not launched yet."""
    runtime = triton.knobs.runtime
    others = runtime.jit_cache_hook

    def refuse(*, fn: Any, **details: Any) -> Any:
        # The hook is one for all threads: others may compile, and so may kernels of others.
        if fn.module.startswith(f"{__package__}.") and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                f"kernel {fn.name} has not run on this device with arguments of these dtypes, sizes and strides, and "
                "while a CUDA graph is captured it cannot be compiled and loaded: call fluxkernels.warm_up, or the op "
                "itself, with the same arguments before the capture"
            )
        return others(fn=fn, **details) if others else None

    runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        runtime.jit_cache_hook = others


def warps(layout: tuple[int, int]) -> int:
    """Warps of a program of streaming/ in an entry of LAYOUTS."""
    columns, lanes = layout
    return min(columns, 128) * lanes // 32


@cache
def rows(values_per_row: int, dtype: torch.dtype) -> int:
    """Rows of a tile: a thread keeps the values of all rows in registers."""
    registers = values_per_row * (3 if dtype == torch.float64 else 1)  # two per number, and temporaries
    return next(rows for rows in (16, 8, 4, 2, 1) if rows == 1 or rows * registers <= 64)


@lru_cache(maxsize=4096)
def layouts(queries: int, groups: int, refs: int, device: torch.device) -> tuple[tuple[int, int], ...]:
    """The entries of LAYOUTS that suit a problem, the preferred one first.

    With few queries, lanes share the reference points, so that there are threads for the whole GPU.
    """
    threads = 512 * multiprocessors(device)
    fitting = [
        (columns, lanes)
        for columns, lanes in LAYOUTS
        if columns <= max(128, queries) and (lanes == 1 or 4 * lanes <= refs)
    ]
    most_lanes = max(fitting, key=lambda layout: layout[1])
    preferred = next((layout for layout in fitting if queries * groups * layout[1] >= threads), most_lanes)
    return tuple(sorted(fitting, key=lambda layout: layout != preferred))


def launch_streaming(
    kernel: Any,
    arguments: Sequence[Any],
    points: Tensor,
    queries: int,
    refs: int,
    values_per_row: int,
    most_queries: int,
    more: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """Launch a kernel of streaming/ for `queries` queries and `refs` reference points per group.

    Args:
        points: `[groups, ..., D]`; their groups, dimension and dtype are those of the problem.
        values_per_row: numbers that the kernel keeps per row of its tiles.
        most_queries: queries per program that its threads can hold.
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
        grid = (-(-queries // columns) * groups, *more)  # only the first axis may exceed 65535
        launch(kernel, grid, *arguments, COLUMNS=columns, LANES=lanes, num_warps=warps(layout), **fixed)

    sizes = [(size - 1).bit_length() for size in (queries, groups, refs)]
    key = (kernel.__name__, D, points.dtype, *sizes, *constants.values())
    fitting = layouts(queries, groups, refs, points.device)
    fastest(key, tuple(dict.fromkeys((min(columns, most_queries), lanes) for columns, lanes in fitting)), run)


def fastest(key: tuple[Hashable, ...], choices: Sequence[Any], run: Callable[[Any], None]) -> None:
    """Run the fastest of a few choices, which all give the same results.

    The first call with a key times all choices on its own arguments, and saves the fastest in a file for later
    processes. While a CUDA graph is captured nothing can be timed, and an unknown key takes the first choice.

    Args:
        key: all that the times depend on, apart from the GPU.
        choices: tuples of numbers; the first is taken unless another is clearly faster.
    """
    if len(choices) == 1 or INTERPRETED or not AUTOTUNE:
        return run(choices[0])
    device = torch.cuda.current_device()
    found = _chosen.get((device, key))
    if found not in choices:
        if torch.cuda.is_current_stream_capturing():
            return run(choices[0])
        found = _chosen[device, key] = _choose(key, choices, run)
    run(found)


# The choices made so far by this process, by index of the device and key.
_chosen: dict[tuple[int, tuple[Hashable, ...]], Any] = {}


def _choose(key: tuple[Hashable, ...], choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
    """The choice that is saved for this model of GPU, or else the fastest."""
    device, name = torch.cuda.get_device_name(), " ".join(map(str, key))
    known = _known(device)
    saved = next((choice for choice in choices if list(choice) == known.get(name)), None)
    if saved is not None:
        return saved
    found, least = choices[0], math.inf
    for choice, seconds in zip(choices, _seconds(choices, run), strict=True):
        if seconds < MARGIN * least:
            found, least = choice, seconds
    known[name] = list(found)
    _save(device, known)
    return found


def _seconds(choices: Sequence[Any], run: Callable[[Any], None]) -> list[float]:
    """Seconds of each choice on the GPU: the least of a few rounds in which the choices take turns."""
    for choice in choices:
        run(choice)  # compiles and loads
    once = [_seconds_queued(run, choice, 1) for choice in choices]
    if sum(once) > LONG:
        return once
    counts = [min(MOST_LAUNCHES, math.ceil(SPAN / max(seconds, 1e-9))) for seconds in once]
    least = [math.inf] * len(choices)
    for _ in range(ROUNDS):
        for i, choice in enumerate(choices):
            least[i] = min(least[i], _seconds_queued(run, choice, counts[i]))
    return least


def _seconds_queued(run: Callable[[Any], None], choice: Any, count: int) -> float:
    """Seconds per launch on the GPU, of `count` launches that are queued while it pauses.

    On an idle GPU a small kernel takes less time than its launch from Python does, and that would be measured.
    """
    pause = PAUSE * count
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pause)
        start.record()
        for _ in range(count):
            run(choice)
        end.record()
        in_time = not start.query()  # the pause has lasted until all were queued
        end.synchronize()
        if in_time or pause >= LONGEST_PAUSE:
            return float(start.elapsed_time(end)) / 1e3 / count
        pause *= 4


def _file(device: str) -> Path:
    # The version is part of the name, so that kernels of a new release are timed again.
    return CACHE / f"{__version__}-{device.replace(' ', '-')}-triton-{triton.__version__}.json"


@cache
def _known(device: str) -> dict[str, Any]:
    """Choices by key as last saved; callers add to this dictionary."""
    return _read(_file(device))


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):  # no file yet, or an incomplete one
        return {}
    return known if isinstance(known, dict) else {}


def _save(device: str, known: dict[str, Any]) -> None:
    """Add the choices to the file, which other processes may have extended since it was read."""
    file = _file(device)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_read(file) | known, indent=1))
        part.replace(file)
    except OSError:
        pass  # then the next process has to time the choices again
