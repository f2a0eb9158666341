"""Networks inside a field: how the losses find them, check them, and differentiate without parameter gradients."""

from __future__ import annotations

import dis
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fluxkernels import compiling

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


# Limits of the search for networks: depth of references (field, owner, list, wrapper, network) and number of objects.
# A field may close over a whole data set.
_MAX_DEPTH, _MAX_OBJECTS = 5, 2000


def reachable_from(field: Callable[..., Any]) -> Iterator[object]:
    """Yield a callable and what it refers to: by closure, global name, argument, owner, attribute or container."""
    waiting: deque[tuple[Any, int]] = deque([(field, 0)])
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_OBJECTS:
        thing, depth = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if depth < _MAX_DEPTH:
            waiting += [(other, depth + 1) for other in islice(_referred_to(thing), _MAX_OBJECTS)]


def _referred_to(thing: Any) -> Iterator[Any]:
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # a variable that is not assigned yet
                yield cell.cell_contents
        if not _belongs_to_library(thing):
            yield from (thing.__globals__[name] for name in _global_names(thing.__code__) if name in thing.__globals__)
    elif isinstance(thing, dict):
        yield from thing.copy().values()
    elif isinstance(thing, (list, tuple)):
        yield from thing
    elif not hasattr(thing, "__dict__") or isinstance(thing, (nn.Module, type, ModuleType)):
        return
    elif not _belongs_to_library(thing):
        yield from vars(thing).copy().values()


@lru_cache(maxsize=1000)
def _global_names(code: CodeType) -> frozenset[str]:
    """Return global names that a function's code reads, inner functions included; names of attributes are excluded."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(own).union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _belongs_to_library(thing: Any) -> bool:
    """Return whether a function, or the class of an object, belongs to a library that holds no network of a user."""
    named = thing if inspect.isfunction(thing) else type(thing)
    return (named.__module__ or "").partition(".")[0] in ("torch", "numpy", "fluxkernels", "builtins")


def networks_of(field: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules reachable from a callable."""
    return [thing for thing in reachable_from(field) if isinstance(thing, nn.Module)]


def check_field(function: str, name: str, field: Any) -> None:
    """Raise TypeError unless a field that a module is to hold is a module itself, or a function without networks."""
    if not callable(field):
        raise TypeError(f"{function}: {name} must be callable, got {type(field).__name__}")
    if not isinstance(field, nn.Module) and (networks := networks_of(field)):
        raise TypeError(
            f"{function}: {name} must be a torch.nn.Module, so that its parameters are registered; got a function that "
            f"uses {type(networks[0]).__name__}"
        )


def is_compiled(field: Callable[..., Any]) -> bool:
    """Return whether a callable, or one reachable from it, was made by `torch.compile`."""
    modules = (module for network in networks_of(field) for module in network.modules())
    return any(hasattr(thing, "_torchdynamo_orig_callable") for thing in reachable_from(field)) or any(
        compiling.is_optimized(module) or module._compiled_call_impl is not None for module in modules
    )


def check_samples_are_independent(function: str, field: Callable[..., Any]) -> None:
    """Raise ValueError if a network normalizes over the minibatch: the derivative of a sample then needs all others."""
    for network in networks_of(field):
        for name, module in network.named_modules():
            if isinstance(module, _BATCH_NORMS) and (module.training or not module.track_running_stats):
                raise ValueError(
                    f"{function}: field must treat each sample by itself, but its layer {name or 'itself'!r} is a "
                    f"{type(module).__name__} in training mode; use GroupNorm or LayerNorm, or put it into eval()"
                )


def check_no_cached_parametrizations(function: str, field: Callable[..., Any]) -> None:
    """Raise RuntimeError if parametrized weights are cached: derivatives in z would cache detached ones."""
    if not parametrize._cache_enabled:
        return
    for network in networks_of(field):
        for module in network.modules():
            if parametrize.is_parametrized(module):
                raise RuntimeError(
                    f"{function}: torch.nn.utils.parametrize.cached() must not be active around a field with "
                    f"parametrized weights ({type(module).__name__}): they would get no gradient"
                )


def own_generators(field: Callable[..., Any]) -> list[torch.Generator]:
    """Return the random number generators that a callable, a network of it or the code of that network refers to."""
    held = list(reachable_from(field))
    modules = [module for network in held if isinstance(network, nn.Module) for module in network.modules()]
    for module in modules:
        if not _belongs_to_library(module):
            held += vars(module).values()
    for kind in {type(module) for module in modules}:
        held += _referred_to(getattr(kind, "forward", None))  # the class of torch.jit.script has none
    return [value for value in held if isinstance(value, torch.Generator)]


class DetachedParameters(TorchFunctionMode):
    """Treat parameters as constants inside the block, in this thread only.

    A derivative in z then stores no activations for gradients of parameters. Every function of PyTorch that is called
    in the block receives detached parameters; the parameters themselves, which other threads may be training, stay as
    they are. Derivatives inside the block are taken with `pull_back`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            return func(*args, **(kwargs or {}))
        return func(*map(_detached, args), **{name: _detached(value) for name, value in (kwargs or {}).items()})


# Attributes of a tensor, which are read far more often than functions are called.
_READS = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")}


def _detached(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return value


# `torch.compile` may look inside the handler, but must not compile it by itself: it would then keep the function of the
# first call for all later ones, so that a - b became a + b (PyTorch 2.13).
for _function in (DetachedParameters.__torch_function__, _detached):
    compiling.skip(_function)


def pull_back(
    f: Tensor, z: Tensor, cotangent: Tensor, *, retain_graph: bool = False, create_graph: bool = False
) -> Tensor:
    """Return J_fᵀ cotangent, zero where f does not depend on z; `torch.autograd.grad` for use in `DetachedParameters`.

    The mode is not active inside of `torch.autograd.grad`, which is a function like others. Layers that are computed
    a second time in the backward pass (activation checkpointing) would then differ from their first time.
    """
    (gradient,) = torch.autograd.graph._engine_run_backward(
        (f,), (cotangent,), retain_graph or create_graph, create_graph, (z,), True, accumulate_grad=False
    )
    return torch.zeros_like(z) if gradient is None else gradient
