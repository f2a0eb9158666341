"""The network's part of ∇r at the end of a chain: ∇(∇·f) + J_fᵀ s.

It is the derivative at α = 0 of J_f(z + α ε)ᵀ(ε + α s), averaged over probes ε (Hutchinson) or summed over a basis:
a directional derivative of one vector-Jacobian product. Four methods compute it, three of them exactly:

- "double_backward": reverse mode twice. Exact; needs a network that can be differentiated twice.
- "forward_over_reverse": forward mode over reverse mode (`torch.func`). Exact; needs forward-mode rules for every op.
- "finite_difference": central difference of two ordinary backward passes. Needs first derivatives only. Both sides go
  through the network in one call, or, where it draws random numbers, in two calls with the same numbers. The step
  depends on the network's precision; see `finite_difference_step`.
- "closed_form": the field's own method `endpoint_gradient`; see `ClosedForm`. Takes no derivative.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fluxkernels import compiling
from fluxkernels.devices import autocast_enabled, check_derivatives_traceable
from fluxmatching.engines import is_in_half_precision
from fluxmatching.field_modules import DetachedParameters, is_compiled, networks_of, own_generators, pull_back
from fluxmatching.fields import Field, call_field, with_arguments
from fluxmatching.randomness import (
    SharedDropout,
    SharedRandomNumbers,
    UnequalMasksError,
    random_layers,
    random_numbers_noticed,
)

# The annotations of torch allow for has_aux, and so for results of two or three parts.
_jvp: Any = torch.func.jvp
_vjp: Any = torch.func.vjp
METHODS = ("double_backward", "forward_over_reverse", "finite_difference", "closed_form")
# Steps of the central difference in units of `scale`: large enough for the difference to stand out of rounding, small
# enough for a small bias. The bias matters more, because rounding averages out. Measured by bench/training/evidence.py.
RELATIVE_STEP = 0.003
RELATIVE_STEP_HALF = 0.01  # networks in bfloat16 or float16
# Evaluations of a compiled field before random numbers count as its own, and not as those of another thread.
TRIES = 3


@runtime_checkable
class ClosedForm(Protocol):
    """Field with a formula for ∇(∇·f) + J_fᵀ s, as second_derivatives="closed_form" requires."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """Return f(z), shape of z."""

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return (gradient, f(z)), both of the shape of z. Called without gradients.

        In components, over all dimensions of the event, s and ε held fixed:

            gradient_d = Σ_i ∂_d ∂_i f_i + Σ_i s_i ∂_d f_i              probe None: the exact divergence
            gradient_d = Σ_ij ε_i ε_j ∂_d ∂_j f_i + Σ_i s_i ∂_d f_i     with a probe ε (Hutchinson)

        A field that has only one of the two formulas raises an error for the other.

        Args:
            z: points, `[n, *event]`, in a grouped loss `[n, G, D]`; read only.
            score: s, shape of z. Arbitrary: the formula must not assume that it is the score at z.
            probe: ε, shape of z, or None.
        """


def basis(z: Tensor, grouped: bool) -> Iterator[Tensor]:
    """Yield unit vectors of the event, or of one group (for all groups at once: groups do not interact)."""
    event = z.shape[-1:] if grouped else z.shape[1:]
    for d in range(event.numel()):
        unit = z.new_zeros(event.numel())
        unit[d] = 1
        yield unit.reshape(event).expand(z.shape).contiguous()


class ConditionedField:
    """A field f(z, σ) at given σ, as a function of z; or a field with another condition, such as a time.

    Args:
        field: f(z, σ).
        condition: σ, `[]` or one per sample, `[N]`.
    """

    def __init__(self, field: Callable[..., Tensor], condition: Tensor) -> None:
        self.field, self.condition = field, condition

    def replace(self, field: Callable[..., Tensor], condition: Tensor) -> ConditionedField:
        """Return the same kind of field with another function and condition."""
        return ConditionedField(field, condition)

    def rows(self, rows: slice | Tensor) -> ConditionedField:
        """Return the field for some of the samples."""
        return self.replace(self.field, rows_of(self.condition, rows))

    def evaluate(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return the value at points z, `[n, *event]`, for a condition `[]` or `[n]`."""
        value: Tensor = with_arguments(self.field, z, condition)
        return value

    def __call__(self, z: Tensor) -> Tensor:
        condition = self.condition
        if condition.ndim and z.shape[0] != condition.shape[0]:  # a method may stack several points per sample
            condition = condition.repeat(z.shape[0] // condition.shape[0])
        return self.evaluate(z, condition)


def endpoint_gradient(
    field: Callable[..., Tensor],
    z: Tensor,
    score: Tensor,
    probe: Tensor | None,
    *,
    method: str,
    grouped: bool = False,
    chunk_size: int | None = None,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute ∇(∇·f) + J_fᵀ s and f at the points z, both detached.

    Args:
        field: maps `[n, *event]` to the same shape, each sample by itself; or a `ConditionedField`.
        z: `[N, *event]`.
        score: s(z), shape of z.
        probe: ε, shape of z; None takes the exact divergence, which costs one pass per coordinate.
        method: one of `METHODS`.
        grouped: `[N, G, D]` whose groups the field treats independently: the exact divergence then needs D passes.
        chunk_size: samples that go through the field at once; None for all.
        scale: length over which f varies, one number or one per sample, the unit of the finite-difference step.

    Returns:
        (gradient, f), each shape of z.

    Raises:
        TypeError: "closed_form" and a field that is no `ClosedForm`, or whose method returns something else.
        ValueError: the field's results have another shape than z.
        RuntimeError: the field lacks the derivatives of this method, or inference mode is on.
    """
    if not z.shape[0]:  # a process may have no endpoints to differentiate
        return torch.empty_like(z), torch.empty_like(z)
    size = chunk_size or z.shape[0]
    # The sizes of a range are numbers in a graph; a graph without chunks is for any number of samples.
    starts = (0,) if chunk_size is None else range(0, z.shape[0], size)
    gradients, values = [], []
    for start in starts:
        rows = slice(start, start + size)
        part = None if probe is None else probe[rows]
        if method == "closed_form":
            gradient, value = _closed_form(field, z[rows].detach(), score[rows], part)
        else:
            probes = basis(z[rows], grouped) if part is None else iter((part,))
            bound = field.rows(rows) if isinstance(field, ConditionedField) else field
            step = rows_of(torch.as_tensor(scale, device=z.device), rows)
            step = step.reshape(-1, *(1 for _ in z.shape[1:])) if step.ndim else step
            gradient, value = _differentiated(bound, z[rows].detach(), score[rows], probes, method, step)
        gradients.append(gradient)
        values.append(value.detach())
    return torch.cat(gradients), torch.cat(values)


def rows_of(number: Tensor, rows: slice | Tensor) -> Tensor:
    """Return the rows of one number per sample, `[N]`; a single one, `[]`, is that of all samples."""
    return number[rows] if number.ndim else number


def _closed_form(field: Field, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(field, ClosedForm):
        raise TypeError(
            f"second_derivatives='closed_form' needs a field with the method endpoint_gradient(z, score, probe) -> "
            f"(gradient, f); {type(field).__name__} has none"
        )
    with torch.no_grad():
        result = field.endpoint_gradient(z, score, probe)
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
        raise TypeError(f"endpoint_gradient of the field must return two tensors (gradient, f), got {result!r}")
    for name, part in zip(("gradient", "f"), result, strict=True):
        if part.shape != z.shape:
            raise ValueError(
                f"endpoint_gradient of the field must return {name} in the shape of z, {list(z.shape)}, got "
                f"{list(part.shape)}"
            )
    gradient, f = result
    return gradient.to(z.dtype), f.to(z.dtype)


def _differentiated(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], method: str, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError("the field's derivatives cannot be taken inside torch.inference_mode(); use torch.no_grad()")
    check_derivatives_traceable(f"second_derivatives='{method}'")
    derivative = {
        "double_backward": _double_backward,
        "forward_over_reverse": _forward_over_reverse,
        "finite_difference": _finite_difference,
    }[method]
    try:
        # A compiled graph stores only what it needs.
        with nullcontext() if torch.compiler.is_compiling() else DetachedParameters():
            return derivative(field, z, score, probes, scale)
    except (RuntimeError, NotImplementedError) as error:
        if (explained := _explained(error, method)) is None:
            raise
        raise explained from error


def _explained(error: Exception, method: str) -> Exception | None:
    """Return an error that names an alternative, if PyTorch lacks a derivative of that kind; else None."""
    if method != "forward_over_reverse" and "transformed by a functorch transform" in str(error):
        return RuntimeError(
            f"second_derivatives='{method}' cannot be used inside a transform of torch.func; "
            f"'forward_over_reverse' can inside of torch.func.grad"
        )
    lacking = {
        "double_backward": ("double backward", "is not differentiable twice", "derivative for"),
        "forward_over_reverse": ("forward AD", "functorch transforms"),
    }
    if any(words in str(error) for words in lacking.get(method, ())):
        return RuntimeError(
            f"the field cannot be differentiated with second_derivatives='{method}' ({error}); "
            f"second_derivatives='finite_difference' needs first derivatives only"
        )
    return None


# A compiled network has no second derivatives: PyTorch raises its own error only while parameters need gradients, and
# else omits them silently. Where the whole loss is compiled, this part of it is not.
@compiling.disable
def _double_backward(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    if is_compiled(field):
        raise NotImplementedError("torch.compile has no double backward")
    with torch.enable_grad():
        z = z.requires_grad_()
        f = call_field(field, z.clone())  # some networks begin with an operation in place
        if not f.requires_grad:
            return torch.zeros_like(z), f
        total = (f * score).sum()
        for probe in probes:
            total = total + (pull_back(f, z, probe, create_graph=True) * probe).sum()
        gradient = pull_back(total, z, torch.ones_like(total))
    return gradient.detach(), f


def _forward_over_reverse(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    def pulled(z: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        f, pull = _vjp(lambda point: call_field(field, point), z)
        return pull(cotangent)[0], f

    gradient, f, moving = torch.zeros_like(z), z, score
    for probe in probes:
        (_, f), (derivative, _) = _jvp(pulled, (z, probe), (probe, moving))
        gradient, moving = gradient + derivative, torch.zeros_like(score)
    return gradient.detach(), f


# Where the whole loss is compiled, the network is, but not the Python around it, which looks at generators.
@compiling.disable(recursive=False)
def _finite_difference(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    step = finite_difference_step(field, z, scale)
    gradient, value, count, moving = torch.zeros_like(z), torch.zeros_like(z), 0, score
    for probe in probes:
        points, cotangents = (z + step * probe, z - step * probe), (probe + step * moving, probe - step * moving)
        (forward, f_forward), (backward, f_backward) = _pull_back_both(field, points, cotangents)
        gradient = gradient + (forward - backward) / (2 * step)
        value, count = value + f_forward + f_backward, count + 2
        moving = torch.zeros_like(score)
    return gradient, value / count


Pulled = tuple[Tensor, Tensor]


@compiling.disable(recursive=False)
def _pull_back_both(
    field: Field, points: tuple[Tensor, Tensor], cotangents: tuple[Tensor, Tensor]
) -> tuple[Pulled, Pulled]:
    """Return (J_fᵀ v, f) on both sides of a difference, with the same random numbers on both.

    One call for both sides takes half as many launches; but dropout then draws a mask for each side, and a difference
    of masks over a small step would be noise. So a field that draws random numbers is called twice.
    """
    layers = _random_layers(field)
    if not layers:
        for _ in range(TRIES):
            with random_numbers_noticed(points[0].device, _own_generators(field)) as drew:
                gradient, f = _pull_back_at_once(field, points, cotangents)
            if not drew():
                (forward, backward), (f_forward, f_backward) = gradient.chunk(2), f.chunk(2)
                return (forward, f_forward), (backward, f_backward)
            if not is_compiled(field):
                break
    if is_compiled(field):
        raise NotImplementedError(
            "the field is compiled and draws random numbers, which differ between the two sides of a finite "
            "difference; call eval(), or give the loss the field before torch.compile"
        )
    if layers and all(type(layer) is nn.Dropout and layer not in _BESIDE_OTHERS for layer in layers):
        both = _pull_back_with_shared_dropout(field, points, cotangents)
        if both is not None:
            return both
        _BESIDE_OTHERS.update(layers)
    numbers = SharedRandomNumbers()
    with numbers.recorded():
        first = _pull_back(field, points[0], cotangents[0])
    with numbers.replayed():
        second = _pull_back(field, points[1], cotangents[1])
    return first, second


# Layers of dropout beside which a field has drawn other random numbers: the quick way does not suit it.
_BESIDE_OTHERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


# The network is not compiled here, for it draws masks that are kept in a list.
@compiling.disable
def _pull_back_with_shared_dropout(
    field: Field, points: tuple[Tensor, Tensor], cotangents: tuple[Tensor, Tensor]
) -> tuple[Pulled, Pulled] | None:
    """Return the result of `_pull_back_both`, or None if the field draws other random numbers than dropout."""
    dropout = SharedDropout()
    with dropout.recorded():
        first = _pull_back(field, points[0], cotangents[0])
    try:
        with random_numbers_noticed(points[0].device, _own_generators(field)) as drew, dropout.replayed():
            second = _pull_back(field, points[1], cotangents[1])
    except UnequalMasksError:
        if not drew():
            raise
        return None  # other random numbers decide which layers there are
    return None if drew() else (first, second)


def _pull_back_at_once(field: Field, points: tuple[Tensor, Tensor], cotangents: tuple[Tensor, Tensor]) -> Pulled:
    """Return (J_fᵀ v, f) of both sides, one below the other.

    Raises:
        RuntimeError: the field takes the rows of one side only.
    """
    try:
        return _pull_back(field, torch.cat(points), torch.cat(cotangents))
    except Exception as error:
        if not any(word in str(error).lower() for word in ("size", "shape", "dimension")):
            raise
        try:
            _pull_back(field, *(pair[0] for pair in (points, cotangents)))
        except Exception:
            raise error from None
        rows = len(points[0])
        raise RuntimeError(
            f"the field is called with several rows per sample, and takes {rows} rows but not {2 * rows} ({error}); "
            f"what it depends on besides z must be part of z, or use second_derivatives='double_backward'"
        ) from error


# The search for networks would be compiled anew for every object that it meets.
_own_generators = compiling.disable(own_generators)


@compiling.disable
def _random_layers(field: Field) -> list[nn.Module]:
    return [layer for network in networks_of(field) for layer in random_layers(network)]


def _pull_back(field: Field, z: Tensor, cotangent: Tensor) -> Pulled:
    """Return (J_f(z)ᵀ cotangent, f(z)), detached."""
    with torch.enable_grad():
        z = z.requires_grad_()
        f = call_field(field, z.clone())  # some networks begin with an operation in place
        if not f.requires_grad:
            return torch.zeros_like(z), f
        gradient = pull_back(f, z, cotangent)
    return gradient.detach(), f.detach()


@compiling.disable
def finite_difference_step(field: Field, z: Tensor, scale: Tensor | float) -> Tensor:
    """Return the step of the central difference, which depends on the precision that the field computes in.

    Half precision is detected by autocast around the loss, by an engine's wrapper or by half-precision parameters, not
    by autocast inside the field.
    """
    half = (
        autocast_enabled(z.device)
        or is_in_half_precision(field)
        or any(
            parameter.dtype in (torch.float16, torch.bfloat16)
            for network in networks_of(field)
            for parameter in network.parameters()
        )
    )
    step = torch.as_tensor((RELATIVE_STEP_HALF if half else RELATIVE_STEP) * scale, dtype=z.dtype, device=z.device)
    # A power of two: z ± step ε is then exact even where z is far from the origin, as ε has components 0 and ±1.
    return torch.exp2(torch.log2(step).round())
