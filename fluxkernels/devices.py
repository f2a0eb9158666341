"""Values of tensors: where they can be read, and how a number reaches a device without making the host wait."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch._C import (
    _dispatch_keys,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

from fluxkernels.transforms import transforms_active


def capturing() -> bool:
    """Return True while a CUDA graph is captured on the current stream."""
    if torch.compiler.is_compiling():
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_tracing() -> bool:
    """Return True while PyTorch records a graph or propagates shapes alone: no value may be read then.

    That is inside of `torch.compile`, `torch.export`, `make_fx`, `torch.jit.trace` and `FakeTensorMode`.
    """
    if torch.compiler.is_compiling():
        return True
    # PyTorch has no public function for this. The tests trace in each mode, and fail if a release moves these names.
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None or get_proxy_mode() is not None or torch._C._get_tracing_state() is not None


def is_eager() -> bool:
    """Return True while PyTorch runs each op at once, and no mode, transform, autocast or profiler sees its calls."""
    # Only `is_compiling` is public. The tests enter each state, and fail if a release moves another name.
    return not (
        is_compiling()
        or transforms_active()
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
        or _profiler_enabled()
    )


@cache
def _plain_keys(kind: str) -> frozenset[int]:
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(_dispatch_keys(torch.empty(0, device=kind)).raw_repr())
    return frozenset(found)


def is_plain(t: Tensor) -> bool:
    """Return True for a dense tensor that is just numbers in the memory of a CPU or a CUDA device.

    That is no subclass, wrapper or negative view.
    """
    # PyTorch has no public function for this. The tests pass each kind of tensor, and fail if a release moves the name.
    if type(t) is not Tensor or not (t.is_cpu or t.is_cuda):
        return False
    return _dispatch_keys(t).raw_repr() in _plain_keys("cpu" if t.is_cpu else "cuda")


def is_plain_call(arguments: Sequence[object]) -> bool:
    """Return True if a call of an op may skip PyTorch's dispatcher, which would only pass it on to the backend."""
    return is_eager() and all(is_plain(t) for t in arguments if isinstance(t, Tensor))


def needs_derivatives(arguments: Sequence[object]) -> bool:
    """Return True if autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in arguments if isinstance(t, Tensor))


def is_part_of_graph(t: Tensor) -> bool:
    """Return True if `t` is an input or a result of a graph that `make_fx` traces, in place of a constant of it."""
    mode = get_proxy_mode()
    return mode is not None and has_proxy_slot(t, mode.tracer)


def check_derivatives_traceable(what: str) -> None:
    """Raise RuntimeError inside of `make_fx(..., pre_dispatch=True)`, before a derivative is taken.

    PyTorch records derivatives there with the values of this run as constants, and the graph is wrong for all others.
    """
    if torch.compiler.is_compiling():
        return
    if torch._ops._get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(f"{what} takes derivatives, which a graph with pre_dispatch=True cannot hold")


def has_values(t: Tensor) -> bool:
    """Return True if `t` has values that a program may depend on here, even if reading them takes long."""
    return not (t.is_meta or is_tracing() or transforms_active() or isinstance(t, FakeTensor))


def can_check_values(t: Tensor) -> bool:
    """Return True if reading the values of `t` is cheap, and allowed here."""
    return t.device.type == "cpu" and has_values(t)


# PyTorch 2.11 cannot trace the question whether a device has autocast, so it is asked here for those that matter.
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for a device; "meta" is one that has none."""
    available = device.type in _WITH_AUTOCAST or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, on a device that has it."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def on_device(name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bring a number to a device, where a copy from the CPU would make the host wait.

    Args:
        name: function and argument, for the error message.
        value: tensor of shape `[]`.

    Raises:
        ValueError: a CUDA graph is captured, and the tensor is on another device. The graph could not copy it, and a
            number read now would be the same in every replay.
    """
    if value.device == device:
        return value if value.dtype == dtype else value.to(dtype)
    if capturing():
        raise ValueError(
            f"{name} must be on {device} while a CUDA graph is captured, got a tensor on {value.device}: copy it to "
            "that device before the capture"
        )
    if can_check_values(value) and not value.requires_grad:
        return torch.full((), value.item(), dtype=dtype, device=device)
    # The copy owns its memory, so that the caller may change `value` before it has arrived.
    return value.clone().to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
