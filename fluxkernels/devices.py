"""Numbers that have to reach the device of the points without making the host wait for that device."""

import torch
from torch import Tensor

from fluxkernels.transforms import transforms_active


def capturing() -> bool:
    """Return True while a CUDA graph is captured on the current stream."""
    if torch.compiler.is_compiling():
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def can_check_values(t: Tensor) -> bool:
    """Return True if reading the values of `t` is cheap, and allowed here."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()


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
        return value.to(dtype)
    if capturing():
        raise ValueError(
            f"{name} must be on {device} while a CUDA graph is captured, got a tensor on {value.device}: copy it to "
            "that device before the capture"
        )
    if can_check_values(value) and not value.requires_grad:
        return torch.full((), value.item(), dtype=dtype, device=device)
    # The copy owns its memory, so that the caller may change `value` before it has arrived.
    return value.clone().to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
