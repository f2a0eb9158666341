"""Equal random numbers in two evaluations of a network, without a change to any generator.

A finite difference needs the same dropout mask on both sides. Saving and restoring the state of torch's generators
would alter what another thread draws meanwhile. Instead the first evaluation draws as usual while its random numbers
are recorded, and the second one receives the recorded numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fluxkernels import compiling

_DROPOUT = torch.ops.aten.native_dropout.default
# Operations whose random result does not depend on the values of their inputs, so that it can be used again.
_FILLS = ("bernoulli_", "normal_", "uniform_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_")
_FACTORIES = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")


class SharedRandomNumbers:
    """Random numbers of one evaluation, kept for the next.

    >>> numbers = SharedRandomNumbers()
    >>> dropout = torch.nn.Dropout()
    >>> with numbers.recorded():
    ...     first = dropout(torch.ones(8))
    >>> with numbers.replayed():
    ...     second = dropout(torch.ones(8))
    >>> torch.equal(first, second)
    True
    """

    def __init__(self) -> None:
        self._numbers: list[tuple[Any, Tensor]] = []

    def __len__(self) -> int:
        return len(self._numbers)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the random numbers that this thread draws inside the block."""
        with _Dispatch(self._record):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Return the recorded numbers inside the block, in their order, instead of drawing new ones.

        Raises:
            RuntimeError: the block draws other numbers than the recorded one did.
        """
        waiting = iter(self._numbers)

        def replay(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            recorded, numbers = next(waiting, (None, torch.empty(0)))
            if recorded is not operation:
                raise RuntimeError(
                    f"the field draws random numbers with {operation} in one evaluation and with {recorded} in another "
                    f"one; a finite difference needs the same numbers in both"
                )
            return _result(operation, args, numbers)

        with _Dispatch(replay):
            yield

    def _record(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        # In a copy: dropout scales its mask in place.
        numbers = result[1] if operation is _DROPOUT else result
        self._numbers.append((operation, numbers.clone()))
        return result


class UnequalMasksError(RuntimeError):
    """Two evaluations do not call dropout in the same way."""


class SharedDropout:
    """Masks of `torch.nn.functional.dropout` in one evaluation, kept for the next: the quick way for most networks.

    Calls of functions are looked at instead of every operation. Other random numbers are not shared;
    `random_numbers_noticed` tells whether there were any.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the masks that this thread draws inside the block."""
        with _Dropout(self._draw):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Use the recorded masks inside the block, in their order.

        Raises:
            UnequalMasksError: the block needs more masks than the recorded one did, or others.
        """
        waiting = iter(self._masks)

        def replay(x: Tensor, probability: float) -> Tensor:
            mask = next(waiting, None)
            if mask is None or mask.shape != x.shape:
                raise UnequalMasksError(
                    "the field draws other masks of dropout in one evaluation than in another one; a finite difference "
                    "needs the same random numbers in both"
                )
            return mask

        with _Dropout(replay):
            yield

    def _draw(self, x: Tensor, probability: float) -> Tensor:
        self._masks.append(torch.empty_like(x).bernoulli_(1 - probability).bool())
        return self._masks[-1]


class _Dropout(TorchFunctionMode):
    """Take the masks of dropout from a function of its input and its probability."""

    def __init__(self, mask_of: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.mask_of = mask_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.drop(*args, **kwargs) if func is functional.dropout else func(*args, **kwargs)

    def drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """`torch.nn.functional.dropout`."""
        if not training or p == 0:
            return functional.dropout(input, p, training, inplace)
        mask, scale = self.mask_of(input.detach(), p), 1 / (1 - p) if p < 1 else 0.0
        return input.mul_(mask).mul_(scale) if inplace else input * mask * scale


for _function in (_Dropout.__torch_function__, _Dropout.drop):
    compiling.skip(_function)  # see `fluxmatching.field_modules`


class _Dispatch(TorchDispatchMode):
    """Pass every operation that draws random numbers in this thread to a handler."""

    def __init__(self, handle: Callable[[Any, Any, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        _check_replayable(func, args)
        return self.handle(func, args, kwargs)


compiling.skip(_Dispatch.__torch_dispatch__)  # see `fluxmatching.field_modules`


def _draws_nothing(operation: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation has a probability of dropout and that is zero, or is not training."""
    for index, argument in enumerate(operation._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in ("dropout_p", "dropout", "p") and value == 0:
            return True
        if argument.name in ("train", "training") and value is False:
            return True
    return False


def _check_replayable(operation: Any, args: Any) -> None:
    name = operation._schema.name.split("::")[-1]
    depends_on_values = any(isinstance(value, Tensor) for value in args[1:])
    if operation is _DROPOUT or (name in (*_FILLS, *_FACTORIES) and not depends_on_values):
        return
    raise NotImplementedError(
        f"the field draws random numbers with {operation}, which cannot be drawn again for the other side of a "
        f"finite difference; use second_derivatives='double_backward', put the field into eval(), or for attention "
        f"with dropout run the loss under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def _result(operation: Any, args: Any, numbers: Tensor) -> Any:
    if operation is _DROPOUT:
        x, probability = args[0], args[1]
        return x * numbers * (1 / (1 - probability) if probability < 1 else 0.0), numbers.clone()
    if operation._schema.is_mutable:
        return args[0].copy_(numbers)
    return numbers.clone()


def random_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers of known kinds that draw random numbers in their present mode."""
    return [module for module in network.modules() if module.training and _probability(module) > 0]


def _probability(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout
    return float(isinstance(module, nn.RReLU))


@contextmanager
def random_numbers_noticed(
    device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Iterator[Callable[[], bool]]:
    """Give a function that tells, after the block, whether a network on this device drew random numbers in it.

    The generators of PyTorch, or those that the network holds, have then moved. Where their states cannot be read,
    under fake tensors and while a CUDA graph is captured, every operation is looked at, which takes longer.
    """
    before = _generator_states(device, generators)
    if before is None:
        numbers = SharedRandomNumbers()
        with numbers.recorded():
            yield lambda: bool(numbers)
    else:
        yield lambda: not all(map(torch.equal, before, _generator_states(device, generators) or ()))


def _generator_states(device: torch.device, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...] | None:
    """Return copies of the states of these generators and of PyTorch's own for a device, None if unreadable."""
    if device.type == "meta" or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    states = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return tuple(states)
