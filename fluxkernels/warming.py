"""Compilation and tuning ahead of a CUDA graph."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluxkernels.backend import BackendError
from fluxkernels.devices import capturing
from fluxkernels.ops.langevin import FluxPass


def warm_up(function: Callable[..., Any], *arguments: Any, derivatives: bool = True, **options: Any) -> None:
    """Compile and tune all kernels of a call, so that a CUDA graph can capture the call.

    >>> import torch
    >>> from fluxkernels import flux_pass, warm_up
    >>> x = torch.randn(256, 2)
    >>> warm_up(flux_pass, x, x, 0.1, 1.0, seed=0)

    A kernel is compiled for dtypes, dimension, and divisibility of sizes and strides. So the arguments must be like
    those of the capture: numbers where that has numbers, tensors of the same shapes and strides on the same device.
    Their values do not matter. They stay as they are, and so do torch's random number generators.

    Args:
        function: an op, such as `flux_pass`, or any function of tensors that calls ops, such as a loss.
        arguments, options: what it takes.
        derivatives: whether to differentiate its results too, with respect to every floating tensor that it is given.

    Raises:
        BackendError: a CUDA graph is being captured already.
        ValueError, TypeError: as the function raises them.
    """
    if capturing():
        raise BackendError("warm_up: a CUDA graph is captured, and nothing can be compiled: call it before the capture")
    given = [_leaf(value) for value in arguments]
    named = {name: _leaf(value) for name, value in options.items()}
    leaves = [value for value in (*given, *named.values()) if isinstance(value, Tensor) and value.requires_grad]
    devices = sorted({value.get_device() for value in (*given, *named.values()) if _on_gpu(value)})
    with torch.random.fork_rng(devices), torch.set_grad_enabled(derivatives):
        results = [t for t in _tensors(function(*given, **named)) if t.requires_grad]
        if leaves and results:
            # The layouts of cotangents: their own memory, and one number for all, as from `sum`.
            for cotangents in ([torch.ones_like(t) for t in results], [t.new_ones(()).expand_as(t) for t in results]):
                torch.autograd.grad(results, leaves, cotangents, retain_graph=True, allow_unused=True)
    for device in devices:
        torch.cuda.synchronize(device)


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _leaf(value: Any) -> Any:
    """A tensor of the same memory, apart from the caller's graph."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield all tensors of a result; of a pass the average of its last scores too, which a training step takes."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, FluxPass):
        yield from (result.x0, result.score0, result.xt, result.score_t, result.transition_average(result.score_t))
    elif isinstance(result, (tuple, list, dict)):
        for part in result.values() if isinstance(result, dict) else result:
            yield from _tensors(part)
