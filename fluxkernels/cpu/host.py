"""The `cpu` backend: the kernels of csrc/, compiled C++ for every CPU.

Arguments in float32 or narrower are computed in float32 with checked errors, others in float64; see section 9 of
MATH.md. Functions, arguments and shapes are those of `fluxkernels.implementation`.
"""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxkernels.implementation import KDE_RESULTS

_import_error: ImportError | None = None
try:
    # Not `from fluxkernels.cpu import`, which reports a missing module as a circular import.
    import fluxkernels.cpu._kernels as _kernels
except ImportError as error:
    _import_error = error
    _kernels = None  # type: ignore[assignment]


def missing() -> str | None:
    """Reason why these kernels cannot run here, or None."""
    if _import_error is None:
        return None
    if isinstance(_import_error, ModuleNotFoundError):
        return (
            "its C++ was not compiled when fluxkernels was installed: FLUXKERNELS_CPU=0 was set, or it did not work; "
            "with GCC or Clang, install again as before, adding FLUXKERNELS_CPU=require in front and "
            "--force-reinstall --no-deps --no-cache-dir behind, to compile it or see why that fails"
        )
    return f"its compiled module cannot be loaded: {_import_error}"


def describe() -> str:
    """Instruction set in use, other instruction sets of this machine, and source of the threads, as one sentence."""
    others = ", ".join(name for name in _kernels.targets() if name != _kernels.target())
    also = f" (also here: {others})" if others else ""
    return f"instruction set {_kernels.target()}{also}, threads: {_kernels.thread_source()}"


def _shape(queries: Tensor, refs: Tensor) -> tuple[int, int, int, int]:
    """(B, N, M, D)"""
    B, N, D = queries.shape
    return B, N, refs.shape[1], D


# A contiguous result in the shape of a tensor.
_empty = partial(torch.empty_like, memory_format=torch.contiguous_format)


def is_finite(t: Tensor) -> bool:
    """Return True if no number of a contiguous tensor is NaN or infinite."""
    return _kernels.is_finite(t, t.numel())


def normal(seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """`fluxkernels.philox.normal`."""
    numbers = torch.empty(shape, dtype=torch.float64, device="cpu")
    elements = math.prod(shape[1:])
    _kernels.normals(int(seed) % 2**64, stream, shape[0], 0, elements, torch.get_num_threads(), numbers.data_ptr())
    return numbers.to(dtype)


def kde(
    z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shape = _shape(z, refs)
    shift = _empty(z) if "shift" in results else None
    mean = _empty(z) if "mean" in results else None
    log_density = z.new_empty((shape[0], shape[1])) if "log_density" in results else None
    _kernels.kde(shape, torch.get_num_threads(), z, refs, sigma2, shift, mean, log_density)
    return shift, mean, log_density


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    results = _empty(z), _empty(refs), _empty(sigma2)
    inputs = g_shift, g_mean, g_log_density, z, refs, sigma2
    _kernels.kde_backward(_shape(z, refs), torch.get_num_threads(), *inputs, *results)
    return results


def kernel_average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = z.shape
    shift = _empty(z) if values is None else z.new_empty((B, N, 0))
    average = z.new_empty((B, N, (refs if values is None else values).shape[-1]))
    log_sum = z.new_empty((B, N), dtype=torch.promote_types(z.dtype, torch.float32))
    _kernels.kernel_average(
        *_average(z, refs, sigma2, values, log_weights, exclude_self, kernel),
        shift if values is None else None,
        average,
        log_sum,
    )
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
    g_z, g_refs, g_sigma2 = _empty(z), _empty(refs), _empty(sigma2)
    g_values, g_log_weights = (None if t is None else _empty(t) for t in (values, log_weights))
    _kernels.kernel_average_backward(
        *_average(z, refs, sigma2, values, log_weights, exclude_self, kernel),
        g_shift if values is None else None,
        g_average,
        g_log_sum,
        g_z,
        g_refs,
        g_sigma2.squeeze(1) if g_sigma2.ndim == 3 else g_sigma2,
        g_values,
        g_log_weights,
    )
    absent = refs.new_empty(0)
    return (
        g_z,
        g_refs,
        g_sigma2,
        absent if g_values is None else g_values,
        absent if g_log_weights is None else g_log_weights,
    )


def sample_reference(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    seed: Tensor,
) -> Tensor:
    index = torch.empty(z.shape[:2], dtype=torch.int64, device="cpu")
    arguments = _average(z, refs, sigma2, None, log_weights, exclude_self, kernel)
    _kernels.sample_reference(*arguments, int(seed) % 2**64, index.data_ptr())
    return index


def _average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Any, ...]:
    """The first arguments of the C++ kernels of `kernel_average`."""
    per_reference = sigma2.ndim == 3
    width = (refs if values is None else values).shape[-1]
    return (
        (*_shape(z, refs), width),
        torch.get_num_threads(),
        (exclude_self, kernel == "laplace", per_reference),
        (z, refs, sigma2.squeeze(1) if per_reference else sigma2, values, log_weights),
    )


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    gradient = _empty(z)
    _kernels.residual_gradient(_shape(z, refs), torch.get_num_threads(), z, field, refs, sigma2, factor, gradient)
    return gradient


def _langevin(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    results: Sequence[Tensor | None],
) -> None:
    _kernels.langevin(
        _shape(x, refs),
        torch.get_num_threads(),
        num_steps,
        None if noise is None else noise[0],
        0 if noise is None else noise.stride(0),
        0 if seed is None else int(seed) % 2**64,
        x,
        refs,
        sigma2,
        tau,
        *results,
    )


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    xt = _empty(x0)
    _langevin(x0, refs, sigma2, tau, num_steps, noise, seed, (None, None, xt, None))
    return xt


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _empty(x), _empty(x), _empty(x), _empty(x)
    _langevin(x, refs, sigma2, tau, num_steps, noise, seed, results)
    return results


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    _kernels.transition_weights(_shape(xt, x0), torch.get_num_threads(), x0, shift0, xt, sigma2, tau, weights)
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    average = values.new_empty((*x0.shape[:2], values.shape[-1]))
    threads, width = torch.get_num_threads(), values.shape[-1]
    _kernels.transition_average(_shape(xt, x0), threads, width, x0, shift0, xt, sigma2, tau, values, average)
    return average
