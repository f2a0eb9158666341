"""Marks for `torch.compile`, set without an import of the compiler, which takes seconds and brings Triton.

PyTorch's public functions for these marks import the compiler where they are used, and that is when this library is
imported. The tests of `torch.compile` fail if a release of PyTorch moves one of the names used here.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._compile import _disable_dynamo as disable  # `torch.compiler.disable`, applied at the first call

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["constant_result", "disable", "is_optimized", "skip"]


def constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result`: a graph keeps the result of the call with which it was compiled."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def skip(function: Callable[..., Any]) -> None:
    """Keep `torch.compile` from compiling a function by itself; it may still look inside where another calls it."""
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))


def is_optimized(module: object) -> bool:
    """Return whether a module was made by `torch.compile`: there is none before the compiler was imported."""
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)
