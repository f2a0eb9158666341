"""Kernels for few dimensions: reference points stream past queries, and no matrix of pairs is ever stored.

They compute in float32, and in float64 for float64 tensors.
"""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.implementation import KDE_RESULTS
from fluxkernels.triton_kernels.launch import launch_streaming, on_device_of, random_arguments, rows, strided, wide
from fluxkernels.triton_kernels.streaming.kde import (
    kde_backward_queries_kernel,
    kde_backward_refs_kernel,
    kde_kernel,
)
from fluxkernels.triton_kernels.streaming.kernel_average import (
    kernel_average_backward_queries_kernel,
    kernel_average_backward_refs_kernel,
    kernel_average_kernel,
    kernel_average_pack_kernel,
)
from fluxkernels.triton_kernels.streaming.langevin import langevin_kernel
from fluxkernels.triton_kernels.streaming.residual import residual_kernel
from fluxkernels.triton_kernels.streaming.transition import (
    transition_average_kernel,
    transition_ends_kernel,
    transition_weights_kernel,
)

# Columns of values that a program of `transition_average` or `kernel_average` keeps in registers.
MOST_VALUES = 16
# Dimensions up to which the registers of a thread hold two queries.
MOST_PAIRED = 4
# Triton specializes a kernel for addresses and strides that are multiples of this, and then loads vectors.
ALIGNMENT = 16


# Kernels that stream packed numbers, with their number per row: for D dimensions and `count` columns of values.
_PACKED: dict[Any, Callable[[int, int], int]] = {
    kde_backward_refs_kernel: lambda D, count: 3 * D + 4,
    transition_average_kernel: lambda D, count: D + 1 + count,
    kernel_average_kernel: lambda D, count: D + count,  # beside the log weight and the scale, where those are packed
    kernel_average_backward_refs_kernel: lambda D, count: D + 2 * (count or D) + 3,
}
# Every kernel, with the numbers that it keeps per row of its tiles. Packed numbers are read once, row after row: they
# take about half as many registers.
_VALUES_PER_ROW: tuple[tuple[Any, Callable[[int, int], int]], ...] = (
    (kde_kernel, lambda D, count: D),
    (kde_backward_queries_kernel, lambda D, count: D),
    (kde_backward_refs_kernel, lambda D, count: (3 * D + 4) // 2),
    (residual_kernel, lambda D, count: D),
    (langevin_kernel, lambda D, count: D),
    (transition_weights_kernel, lambda D, count: 2 * D),
    (transition_ends_kernel, lambda D, count: D),
    (transition_average_kernel, lambda D, count: (D + 1 + count) // 2),
    (kernel_average_pack_kernel, lambda D, count: D),
    (kernel_average_kernel, lambda D, count: (max(D, count) + 1) // 2 if count else D),  # differences are dropped
    (kernel_average_backward_queries_kernel, lambda D, count: (max(D, count) + 1) // 2 if count else D),
    (kernel_average_backward_refs_kernel, lambda D, count: (D + 2 * (count or D) + 3) // 2),
)


def values_per_row(kernel: Any, D: int, count: int = 0) -> int:
    """Numbers that a kernel keeps per row of its tiles, if it takes `count` columns of values at once."""
    return next(values(D, count) for each, values in _VALUES_PER_ROW if each is kernel)


def packed_width(kernel: Any, D: int, dtype: torch.dtype, count: int = 0, more: int = 0) -> int:
    """Packed numbers per row, with `more` beside the kernel's own, padded so that a tile ends at a multiple of four."""
    unit = max(1, 4 // rows(values_per_row(kernel, D, count), dtype))
    return -(-(_PACKED[kernel](D, count) + more) // unit) * unit


def _launch(
    kernel: Any,
    arguments: Sequence[Any],
    points: Tensor,
    queries: int,
    refs: int,
    more: tuple[int, ...] = (),
    **constants: Any,
) -> None:
    """`launch_streaming` with what suits the kernel and the dimension."""
    D = points.shape[-1]
    per_row = values_per_row(kernel, D, constants.get("COUNT", 0))
    # Threads with two queries would exchange weights before they store them.
    paired = D <= MOST_PAIRED and kernel is not transition_weights_kernel
    launch_streaming(kernel, arguments, points, queries, refs, per_row, 256 if paired else 128, more, **constants)


def _aligned(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """New tensor `[..., rows, numbers]` whose last axes are contiguous and begin at multiples of ALIGNMENT."""
    padded = -(-shape[-2] // ALIGNMENT) * ALIGNMENT
    return like.new_empty((*shape[:-2], padded, shape[-1]), dtype=dtype)[..., : shape[-2], :]


def _streamed(t: Tensor) -> Tensor:
    """The points `[B, M, D]` with adjacent coordinates from aligned addresses, which kernels load as vectors."""
    B, M, D = t.shape
    if (M == 1 or t.stride(1) == D) and (D == 1 or t.stride(2) == 1) and t.data_ptr() % ALIGNMENT == 0:
        if B == 1:
            return t.as_strided(t.shape, (0, D, 1))
        if t.stride(0) % ALIGNMENT == 0:
            return t
    return _aligned(t.shape, t, t.dtype).copy_(t)


def _group(t: Tensor) -> tuple[Tensor, int]:
    """A streamed tensor and its one stride that differs."""
    t = _streamed(t)
    return t, t.stride(0)


def kde(z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS) -> tuple[Tensor, Tensor, Tensor]:
    # One kernel sums all of them: none costs much.
    N, M = z.shape[1], refs.shape[1]
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:-1])
    with on_device_of(z):
        inputs = [*strided(z), *_group(refs), *strided(sigma2)]
        _launch(kde_kernel, [*inputs, shift, mean, log_density, N, M], z, N, M)
    return shift, mean, log_density


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), M = z.shape, refs.shape[1]
    g_z, g_refs, g_sigma2 = z.new_empty(z.shape), refs.new_empty(refs.shape), sigma2.new_empty(sigma2.shape)
    width = packed_width(kde_backward_refs_kernel, D, z.dtype)
    packed = _group(_aligned((B, N, width), z, wide(z.dtype)))
    with on_device_of(z):
        streamed = _group(refs)
        inputs = [*strided(z), *streamed, *strided(sigma2, g_shift, g_mean, g_log_density)]
        _launch(kde_backward_queries_kernel, [*inputs, g_z, g_sigma2, *packed, N, M], z, N, M, WIDTH=width)
        _launch(kde_backward_refs_kernel, [*streamed, *packed, g_refs, N, M], z, M, N, WIDTH=width)
    return g_z, g_refs, g_sigma2


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    N, M = z.shape[1], refs.shape[1]
    gradient = z.new_empty(z.shape)
    with on_device_of(z):
        # Without a factor, a placeholder that is never read.
        inputs = [*strided(z, field), *_group(refs), *strided(sigma2, sigma2 if factor is None else factor)]
        _launch(residual_kernel, [*inputs, gradient, N, M], z, N, M, FACTOR=factor is not None)
    return gradient


def _langevin(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    whole_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ); without `whole_pass` only x_τ is computed."""
    N, M = x.shape[1], refs.shape[1]
    xt = x.new_empty(x.shape)
    x0, shift0, shift_t = (x.new_empty(x.shape) for _ in range(3)) if whole_pass else (xt, xt, xt)
    random = random_arguments(x, noise, seed)
    with on_device_of(x):
        inputs = [*strided(x), *_group(refs), *strided(sigma2, tau)]
        arguments = [*inputs, *random, x0, shift0, xt, shift_t, N, M, num_steps]
        _launch(langevin_kernel, arguments, x, N, M, PASS=whole_pass, SEEDED=noise is None)
    return x0, shift0, xt, shift_t


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    return _langevin(x0, refs, sigma2, tau, num_steps, noise, seed, False)[2]


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _langevin(x, refs, sigma2, tau, num_steps, noise, seed, True)


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    N, E = x0.shape[1], xt.shape[1]
    weights = x0.new_empty((*x0.shape[:2], E))
    with on_device_of(x0):
        inputs = [*_group(x0), *_group(shift0), *strided(xt, sigma2, tau)]
        _launch(transition_weights_kernel, [*inputs, weights, N, E], x0, E, N)
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    (B, N, D), (E, V) = x0.shape, values.shape[1:]
    average = values.new_empty((B, N, V))
    count = min(V, MOST_VALUES)
    chunks = -(-V // count)
    width = packed_width(transition_average_kernel, D, x0.dtype, count)
    packed = _aligned((B, chunks, E, width), x0, wide(x0.dtype))
    columns: dict[str, Any] = {"COUNT": count, "WIDTH": width}
    with on_device_of(x0):
        starts = [*_group(x0), *_group(shift0)]
        into = [packed, *packed.stride()[:2]]
        inputs = [*starts, *strided(xt, values, sigma2, tau)]
        _launch(transition_ends_kernel, [*inputs, *into, N, E, V], x0, E, N, **columns)
        inputs = [*starts, *strided(sigma2, tau)]
        _launch(transition_average_kernel, [*inputs, *into, average, N, E, V], x0, N, E, (chunks,), **columns)
    return average


class _Streamed(NamedTuple):
    """Input of the kernels of `kernel_average`.

    Attributes:
        numbers: packed numbers of the reference points, or these themselves, and strides of groups and of chunks.
        tops: largest log weight per group and its stride, or a placeholder that is never read.
        chunks: chunks of columns of the values.
        has_logs: whether there are log weights.
        kind: constants of all kernels.
    """

    numbers: list[Any]
    tops: list[Any]
    chunks: int
    has_logs: bool
    kind: dict[str, Any]


def _stream(
    refs: Tensor, sigma2: Tensor, values: Tensor | None, log_weights: Tensor | None, exclude_self: bool, kernel: str
) -> _Streamed:
    """Pack what belongs to a reference point, if there is more than its coordinates."""
    (B, M, D), V = refs.shape, 0 if values is None else values.shape[2]
    per_ref, has_logs = sigma2.ndim == 3, log_weights is not None
    weighted = has_logs or per_ref
    count = min(V, MOST_VALUES)
    chunks = -(-V // count) if count else 1
    own = {"COUNT": count, "WEIGHTED": weighted, "PER_REF": per_ref, "LAPLACE": kernel == "laplace"}
    tops = log_weights.amax(-1).clamp_min(torch.finfo(log_weights.dtype).min) if log_weights is not None else sigma2
    tops_arguments = [tops, tops.stride(0) if has_logs else 0]
    if not (count or weighted):
        return _Streamed(
            [*_group(refs), 0], tops_arguments, chunks, False, {**own, "WIDTH": D, "EXCLUDE": exclude_self}
        )
    width = packed_width(kernel_average_kernel, D, refs.dtype, count, weighted + per_ref)
    packed = _aligned((B, chunks, M, width), refs, wide(refs.dtype))
    numbers = [packed, *packed.stride()[:2]]
    inputs = strided(refs, refs if values is None else values)
    # Placeholders where there are none.
    inputs += [*strided(log_weights), *tops_arguments] if log_weights is not None else [refs, 0, 0, *tops_arguments]
    inputs += [sigma2, sigma2.stride(0), sigma2.stride(-1)]
    constants = {**own, "WIDTH": width, "LOGS": has_logs}
    _launch(kernel_average_pack_kernel, [*inputs, *numbers, M, V], refs, M, M, (chunks,), **constants)
    return _Streamed(numbers, tops_arguments, chunks, has_logs, {**own, "WIDTH": width, "EXCLUDE": exclude_self})


def kernel_average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), M = z.shape, refs.shape[1]
    V = D if values is None else values.shape[2]
    shift = z.new_empty((B, N, D if values is None else 0))
    average, log_sum = z.new_empty((B, N, V)), z.new_empty((B, N), dtype=wide(z.dtype))
    with on_device_of(z):
        of = _stream(refs, sigma2, values, log_weights, exclude_self, kernel)
        inputs = [*strided(z), *of.numbers, sigma2, sigma2.stride(0), sigma2.stride(1), *of.tops]
        arguments = [*inputs, shift, average, log_sum, N, M, V]
        _launch(kernel_average_kernel, arguments, z, N, M, (of.chunks,), LOGS=of.has_logs, **of.kind)
    return shift, average, log_sum


def kernel_average_backward(
    g_shift: Tensor,
    g_average: Tensor,
    g_log_sum: Tensor,
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, N, D), M, V = z.shape, refs.shape[1], g_average.shape[2]
    with on_device_of(z):
        of = _stream(refs, sigma2, None if values is None else _centered(values), log_weights, exclude_self, kernel)
        width = packed_width(kernel_average_backward_refs_kernel, D, z.dtype, of.kind["COUNT"])
        packed = _aligned((B, of.chunks, N, width), z, wide(z.dtype))
        queries = [packed, *packed.stride()[:2]]

        def parts(like: Tensor) -> Tensor:
            """A cotangent per chunk: they are added in the dtype of the sums."""
            return like.new_empty((of.chunks, *like.shape), dtype=wide(z.dtype) if of.chunks > 1 else like.dtype)

        g_z, g_refs, g_sigma2 = parts(z), parts(refs), parts(sigma2)
        g_values = z.new_empty(0) if values is None else values.new_empty(values.shape)
        # Those of equal weights are computed and dropped.
        g_logs = parts(refs[..., 0] if log_weights is None else log_weights)
        variance = [sigma2, sigma2.stride(0), sigma2.stride(-1)]
        inputs = [*strided(z), *of.numbers, *variance, *strided(g_shift, g_average, g_log_sum)]
        kind = {**of.kind, "QUERY_WIDTH": width}
        arguments = [*inputs, g_z, g_sigma2, *queries, N, M, V]
        _launch(kernel_average_backward_queries_kernel, arguments, z, N, M, (of.chunks,), **kind)
        arguments = [*of.numbers, *queries, *variance, g_refs, g_values, g_logs, g_sigma2, N, M, V]
        _launch(kernel_average_backward_refs_kernel, arguments, z, M, N, (of.chunks,), **kind)
    return (
        _added(g_z, z),
        _added(g_refs, refs),
        _added(g_sigma2, sigma2),
        g_values,
        z.new_empty(0) if log_weights is None else _added(g_logs, log_weights),
    )


def _centered(values: Tensor) -> Tensor:
    """The values less the middle one of each column, in the dtype of sums.

    Derivatives depend on differences of the values alone, of which an average far from 0 would take digits; unlike a
    mean, the middle one is near most values whatever a few others are.
    """
    values, at = values.to(wide(values.dtype)), values.shape[1] // 2
    middle = values.sort(1).values[:, at : at + 1]
    return values - middle


def _added(parts: Tensor, like: Tensor) -> Tensor:
    """Sum of the parts of a cotangent, in the dtype of its tensor."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(like.dtype)
