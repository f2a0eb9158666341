"""Checks of user arguments, and their conversion to one flat form.

An error message names the function, the argument, what it takes and what it got. Values are checked where that is
cheap: on the CPU, outside of `torch.compile`. On an accelerator, reading values would make the host wait.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from fluxkernels import cpu
from fluxkernels.backend import resolve_backend
from fluxkernels.compiling import constant_result
from fluxkernels.devices import can_check_values as can_check_values
from fluxkernels.devices import is_eager, is_part_of_graph, is_plain, on_device

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(t: Tensor) -> str:
    """The shape in a user's notation: [3, 2]."""
    return str(list(t.shape))


def check_dense(function: str, name: str, t: Tensor) -> None:
    """Raise TypeError for a tensor without strides: sparse, nested, masked, or in the format of oneDNN (mkldnn)."""
    if t.is_nested:
        got = "a nested tensor; its unbind() gives dense ones"
    elif t.layout != torch.strided:
        got = f"layout {str(t.layout).removeprefix('torch.')}; its to_dense() gives one"
    elif isinstance(t, MaskedTensor):
        got = "a masked tensor; its get_data() gives one"
    else:
        return
    raise TypeError(f"{function}: {name} must be a dense tensor, got {got}")


def check_tensor(function: str, name: str, t: object, like: Tensor | None = None) -> Tensor:
    """Return `t` if it is a non-empty dense floating tensor with the dtype and device of `like`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{function}: {name} must have a floating dtype, got {t.dtype}")
    if like is not None and t.dtype != like.dtype:
        raise TypeError(f"{function}: {name} must have the dtype of the first argument, {like.dtype}, got {t.dtype}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{function}: {name} must be on {like.device} like the first argument, got {t.device}")
    check_dense(function, name, t)
    if t.numel() == 0:
        raise ValueError(f"{function}: {name} must not be empty, got shape {shape_of(t)}")
    return t


def check_finite(function: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor contains NaN or infinity."""
    eager = is_eager()
    for name, t in tensors.items():
        if t is None:
            continue
        if eager and t.is_cpu and is_plain(t) and t.is_contiguous() and cpu.missing() is None:
            finite = cpu.is_finite(t)
        else:
            # The sum is finite only if every entry is; the slower test is for sums that overflow.
            finite = (
                not can_check_values(t) or math.isfinite(t.detach().sum().item()) or bool(t.detach().isfinite().all())
            )
        if not finite:
            raise ValueError(f"{function}: {name} must be finite, got NaN or infinity")


def read_numbers(function: str, name: str, t: Tensor) -> list[float]:
    """Return the values of a vector as numbers.

    Raises:
        RuntimeError: it has none: it is on meta, a fake tensor, or the result of a graph that is traced.
    """
    failed: RuntimeError | None = None
    # `tolist` would read a tensor of the graph all the same, and the graph would hold its present values.
    if torch.compiler.is_compiling() or not is_part_of_graph(t):
        try:
            return [float(number) for number in t.tolist()]
        except RuntimeError as error:
            failed = error
    raise RuntimeError(
        f"{function}: {name} must have values, which are needed as numbers; a tensor on meta, a fake tensor and one in "
        f"a graph that is traced have none"
    ) from failed


def check_points(function: str, name: str, t: object, like: Tensor | None = None) -> Tensor:
    """Return `t` if it is a tensor `[..., N, D]`, or one row of values for each of N points."""
    t = check_tensor(function, name, t, like)
    if t.ndim < 2:
        shape, hint = {
            "refs": ("[..., M, D]", ""),
            "values": ("[..., points, V]", "; values.unsqueeze(-1) has rows of one number"),
        }.get(name, ("[..., N, D]", ""))
        raise ValueError(f"{function}: {name} must have shape {shape}, got {shape_of(t)}{hint if t.ndim else ''}")
    return t


def check_same_shape(function: str, name: str, t: object, other: str, like: Tensor) -> Tensor:
    """Return `t` if it has the shape, dtype and device of `like`, the argument named `other`."""
    t = check_tensor(function, name, t, like)
    if t.shape != like.shape:
        raise ValueError(f"{function}: {name} must have the shape of {other}, {shape_of(like)}, got {shape_of(t)}")
    return t


def as_number_tensor(function: str, name: str, value: object, like: Tensor, zero: bool = False) -> Tensor:
    """Convert a float or tensor of positive numbers (or zeros, with `zero`) to a tensor of at least float32.

    The check is on the rounded number: a bandwidth below the range of float32 is zero there, and refused.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    takes = "a non-negative" if zero else "a positive"
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{function}: {name} must be {takes} float or floating tensor, got dtype {value.dtype}")
        check_dense(function, name, value)
        if value.device != like.device and value.ndim > 0:
            raise ValueError(f"{function}: {name} must be on {like.device} like the first argument, got {value.device}")
        converted = on_device(f"{function}: {name}", value, like.device, dtype)
        for readable in (value, converted):
            if can_check_values(readable):
                if not _is_in_range(readable, dtype, zero):
                    raise ValueError(
                        f"{function}: {name} must be {takes} finite number, got {_worst(readable.detach())}"
                    )
                break
        return converted
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{function}: {name} must be {takes} float or floating tensor, got {type(value).__name__}")
    number = float(value)
    if not torch.compiler.is_compiling():  # when compiling, a number may be a symbol without a value
        limits = torch.finfo(dtype)
        least = 0 if zero else limits.tiny
        if not least <= number <= limits.max:
            sound = math.isfinite(number) and number > 0
            raise ValueError(
                f"{function}: {name} must be {takes} finite number{f' in {dtype}' if sound else ''}, got {value}"
            )
    return torch.full((), number, dtype=dtype, device=like.device)


def _is_in_range(values: Tensor, dtype: torch.dtype, zero: bool) -> bool:
    """Return True if all values, rounded to `dtype`, are finite and positive, or zero with `zero`."""
    if values.numel() == 0:
        return True
    if values.dtype != dtype:
        values = values.to(dtype)
    least, most = (values, values) if values.ndim == 0 else values.detach().aminmax()
    limits = torch.finfo(dtype)
    # A NaN is within no limits.
    return bool((0 if zero else limits.tiny) <= least.item() and most.item() <= limits.max)


def _worst(values: Tensor) -> float:
    bad = values[~values.isfinite()]
    return (bad.flatten()[0] if bad.numel() else values.min()).item()


class Groups(NamedTuple):
    """The common leading dimensions of an op's arguments, flattened into one: B groups."""

    function: str
    batch: torch.Size

    def points(self, t: Tensor) -> Tensor:
        """`[..., N, D]` to `[B, N, D]`."""
        if t.ndim == 2 and not self.batch:
            return t.unsqueeze(0)
        if t.ndim == 3 and t.shape[:1] == self.batch:
            return t
        return t.expand(*self.batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:])

    def per_group(self, name: str, t: Tensor, queries: int | None = None) -> Tensor:
        """`[]` or `[...]` to `[B]`; with `queries`, an error lists the shape with one entry per query too."""
        if t.ndim == 0:
            return t.expand(math.prod(self.batch))
        if t.ndim > len(self.batch):
            other = "" if queries is None else f" or one per query, {[*self.batch, queries]}"
            raise ValueError(
                f"{self.function}: {name} must be a number or have one entry per group, shape {list(self.batch)}{other}"
                f", got {shape_of(t)}"
            )
        return self._expand(name, t, self.batch).reshape(-1)

    def per_query(self, name: str, t: Tensor, queries: int) -> Tensor:
        """`[]`, `[...]` or `[..., N]` to `[B, N]`."""
        if t.ndim == 0:
            return t.expand(math.prod(self.batch), queries)
        target = torch.Size((*self.batch, queries))
        if t.ndim != len(target):
            t = self.per_group(name, t, queries)
            t = t.reshape(*self.batch, 1) if self.batch else t
        return self._expand(name, t, target).reshape(-1, queries)

    def unflatten(self, t: Tensor) -> Tensor:
        """`[B, ...]` back to `[..., ...]`."""
        if len(self.batch) <= 1:
            return t if self.batch else t.squeeze(0)
        return t.reshape(*self.batch, *t.shape[1:])

    def _expand(self, name: str, t: Tensor, target: torch.Size) -> Tensor:
        try:
            return t.expand(target)
        except RuntimeError:
            raise ValueError(
                f"{self.function}: {name} of shape {shape_of(t)} does not fit {list(target)}: "
                f"one number, one per group or (kde ops) one per query"
            ) from None


def group(function: str, **tensors: Tensor) -> Groups:
    """Groups that the leading dimensions of tensors `[..., N, D]` define together.

    Raises:
        ValueError: their leading dimensions do not broadcast, or their last dimensions differ.
    """
    (first, example), *others = tensors.items()
    for name, t in others:
        if t.shape[-1] != example.shape[-1]:
            raise ValueError(
                f"{function}: {name} must have the same last dimension as {first}, "
                f"{example.shape[-1]}, got shape {shape_of(t)}"
            )
    batch, *further = (t.shape[:-2] for t in tensors.values())
    try:
        if any(other != batch for other in further):
            batch = torch.broadcast_shapes(batch, *further)
    except RuntimeError:
        shapes = ", ".join(f"{name} {shape_of(t)}" for name, t in tensors.items())
        raise ValueError(f"{function}: leading dimensions do not broadcast: {shapes}") from None
    return Groups(function, batch)


def check_groups(function: str, **points: Tensor) -> Groups:
    """Groups of finite tensors `[..., N, D]`, all with the dtype and device of the first, by `group`."""
    first, *others = points.values()
    if is_eager() and _are_sound(first, others):
        return Groups(function, first.shape[:-2])
    for name, t in points.items():
        check_points(function, name, t, like=None if t is first else first)
    check_finite(function, **points)
    return group(function, **points)


def _are_sound(first: Tensor, others: Sequence[Tensor]) -> bool:
    """Return True if plain tensors pass every check of `check_groups`; False leaves the decision to the checks."""
    if not (is_plain(first) and first.dtype in FLOATS and first.ndim >= 2 and _is_sound(first)):
        return False
    dtype, shape, device = first.dtype, first.shape, first.device
    for t in others:
        if not (is_plain(t) and t.dtype == dtype and t.device == device and t.ndim == len(shape) and _is_sound(t)):
            return False
        if t.shape[:-2] != shape[:-2] or t.shape[-1] != shape[-1]:
            return False
    return True


def _is_sound(t: Tensor) -> bool:
    if not t.is_contiguous() or t.numel() == 0:
        return False
    return t.is_cuda or (cpu.missing() is None and cpu.is_finite(t))  # a GPU's values are not waited for


def check_number(function: str, name: str, value: object) -> float:
    """Return a finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a finite number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{function}: {name} must be a finite number, got {value}")
    return float(value)


def check_positive(function: str, name: str, value: object) -> float:
    """Return a finite positive number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a positive number, got {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{function}: {name} must be a positive number, got {value}")
    return number


def check_choice(function: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_sigma_range(function: str, sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max < ∞."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"{function}: 0 < sigma_min < sigma_max must hold, got {sigma_min} and {sigma_max}")


def check_num_steps(function: str, value: object, name: str = "num_steps") -> int:
    """Return a positive number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be a positive integer, got {value!r}")
    return value


def check_seed(function: str, seed: object) -> int | Tensor | None:
    """Return a seed: None, an integer below 2⁶⁴, or an int64 tensor of shape []."""
    if isinstance(seed, Tensor):
        check_dense(function, "seed", seed)
        if seed.dtype != torch.int64 or seed.ndim:
            raise TypeError(
                f"{function}: seed must be an integer or an int64 tensor of shape [], got {seed.dtype} {shape_of(seed)}"
            )
        return seed
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"{function}: seed must be an integer or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"{function}: seed must lie in [-2^63, 2^64), got {seed}")
    return int(seed)


def check_noise(
    function: str, noise: object, seed: object, shape: Sequence[int], like: Tensor
) -> tuple[Tensor | None, int | Tensor | None]:
    """Return (noise, seed), of which at least one is None; the noise must have that shape."""
    if noise is not None and seed is not None:
        raise ValueError(f"{function}: give noise or seed, not both")
    if noise is None:
        return None, check_seed(function, seed)
    noise = check_tensor(function, "noise", noise, like)
    if noise.shape != torch.Size(shape):
        raise ValueError(f"{function}: noise must have shape {list(shape)}, got {shape_of(noise)}")
    return noise, None


def pick_backend(backend: str | None, device: torch.device) -> str:
    """Name of the backend from `resolve_backend`; a constant inside a compiled graph."""
    if not torch.compiler.is_compiling():
        return resolve_backend(backend, device)
    return _resolve_constant(backend, device.type, device.index)


@constant_result
def _resolve_constant(backend: str | None, device_type: str, index: int | None) -> str:
    return resolve_backend(backend, torch.device(device_type) if index is None else torch.device(device_type, index))
