"""The network's part of ∇r at the end of a chain: ∇(∇·f) + J_fᵀ s.

It is the derivative at α = 0 of J_f(z + α ε)ᵀ(ε + α s), averaged over probes ε (Hutchinson) or summed over a basis,
hence a directional derivative of one vector-Jacobian product. Four ways to take it, the same in exact arithmetic:

- "reverse": twice reverse mode. Exact; needs a network that can be differentiated twice.
- "forward": forward mode over reverse mode (`torch.func`). Exact; needs forward-mode rules for every op.
- "central": central difference of two ordinary backward passes. Needs first derivatives only. Both sides see the same
  dropout mask, except inside `torch.compile`. Its step grows as the network's precision falls; see `central_step`.
- "closed_form": the field says it itself, by its method `endpoint_gradient`; see `ClosedForm`. Takes no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fluxmatching.networks import is_compiled, networks_of, parameters_at_rest

Field = Callable[[Tensor], Tensor]
# torch annotates these as if has_aux were always possible, with results of two or three.
_jvp: Any = torch.func.jvp
_vjp: Any = torch.func.vjp
METHODS = ("reverse", "forward", "central", "closed_form")
# Steps of the central difference in units of `scale`: large enough for the difference to stand out of rounding, small
# enough for its bias, which is the worse of the two: rounding averages out. Measured by bench/training/evidence.py.
RELATIVE_STEP = 0.003
RELATIVE_STEP_HALF = 0.01  # networks in bfloat16 or float16


@runtime_checkable
class ClosedForm(Protocol):
    """A field that knows ∇(∇·f) + J_fᵀ s by itself: what endpoint="closed_form" asks for."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """f(z), shape of z."""

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """(gradient, f(z)), both of the shape of z; called without gradients.

        In components, over all dimensions of the event, s and ε held fixed:

            gradient_d = Σ_i ∂_d ∂_i f_i + Σ_i s_i ∂_d f_i              probe None: the exact divergence
            gradient_d = Σ_ij ε_i ε_j ∂_d ∂_j f_i + Σ_i s_i ∂_d f_i     with a probe ε (Hutchinson)

        A field that knows one of the two raises an error for the other.

        Args:
            z: points, `[n, *event]`, in a grouped loss `[n, G, D]`; to be read only.
            score: s, shape of z. The formula is to hold whatever it is.
            probe: ε, shape of z, or None.
        """


def call_field(field: Callable[..., Tensor], z: Tensor, *condition: Tensor) -> Tensor:
    """field(z, *condition) in the dtype of z; ValueError if it has another shape."""
    f = field(z, *condition)
    if not isinstance(f, Tensor):
        raise TypeError(f"field must return a torch.Tensor, got {type(f).__name__}")
    if f.shape != z.shape:
        raise ValueError(f"field must return the shape of its input, {list(z.shape)}, got {list(f.shape)}")
    if not f.is_floating_point():
        raise TypeError(f"field must return floating-point numbers, got {f.dtype}")
    return f.to(z.dtype)


def basis(z: Tensor, grouped: bool) -> Iterator[Tensor]:
    """Unit vectors of the event, or of one group (for all groups at once, as groups do not act on each other)."""
    event = z.shape[-1:] if grouped else z.shape[1:]
    for d in range(event.numel()):
        unit = z.new_zeros(event.numel())
        unit[d] = 1
        yield unit.reshape(event).expand(z.shape).contiguous()


def endpoint_gradient(
    field: Field,
    z: Tensor,
    score: Tensor,
    probe: Tensor | None,
    *,
    method: str,
    grouped: bool = False,
    chunk: int | None = None,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """∇(∇·f) + J_fᵀ s and f at the points z, both detached.

    Args:
        field: maps `[n, *event]` to the same shape, each sample by itself.
        z: `[N, *event]`.
        score: s(z), shape of z.
        probe: ε, shape of z; None takes the exact divergence, at the price of one pass for each coordinate.
        method: "reverse", "forward", "central" or "closed_form".
        grouped: `[N, G, D]` whose groups the field treats independently: the exact divergence then needs D passes.
        chunk: samples that go through the field at once; None for all.
        scale: length over which f bends, one number, the unit of the step of "central".

    Returns:
        (gradient, f), each shape of z.

    Raises:
        TypeError: "closed_form" and a field that is no `ClosedForm`, or whose method returns something else.
        ValueError: the field's results have another shape than z.
        RuntimeError: the field cannot be differentiated that way, or not here.
    """
    if not z.shape[0]:  # a process whose share of the ends is none
        return torch.empty_like(z), torch.empty_like(z)
    size = chunk or z.shape[0]
    gradients, values = [], []
    for start in range(0, z.shape[0], size):
        rows = slice(start, start + size)
        part = None if probe is None else probe[rows]
        if method == "closed_form":
            gradient, value = _closed_form(field, z[rows].detach(), score[rows], part)
        else:
            probes = basis(z[rows], grouped) if part is None else iter((part,))
            gradient, value = _differentiated(field, z[rows].detach(), score[rows], probes, method, scale)
        gradients.append(gradient)
        values.append(value.detach())
    return torch.cat(gradients), torch.cat(values)


def _closed_form(field: Field, z: Tensor, score: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(field, ClosedForm):
        raise TypeError(
            f"endpoint='closed_form' needs a field with the method endpoint_gradient(z, score, probe) -> "
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
    way = {"reverse": _reverse, "forward": _forward, "central": _central}[method]
    try:
        # A compiled graph keeps no more than it needs anyway.
        with nullcontext() if torch.compiler.is_compiling() else parameters_at_rest(field):
            return way(field, z, score, probes, scale)
    except (RuntimeError, NotImplementedError) as error:
        if (explained := _explained(error, method)) is None:
            raise
        raise explained from error


def _explained(error: Exception, method: str) -> Exception | None:
    """An error with a way out, if this one is PyTorch's word that it lacks a derivative of that kind."""
    lacking = {
        "reverse": ("double backward", "is not differentiable twice", "derivative for"),
        "forward": ("forward AD", "functorch transforms"),
    }
    if any(words in str(error) for words in lacking.get(method, ())):
        return RuntimeError(
            f"the field cannot be differentiated with endpoint='{method}' ({error}); endpoint='central' needs first "
            f"derivatives only"
        )
    return None


def _or_zeros(gradient: Tensor | None, z: Tensor) -> Tensor:
    """A field that does not look at z has no gradient, which is to say a zero one."""
    return torch.zeros_like(z) if gradient is None else gradient


def _reverse(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    # PyTorch's own error comes only while parameters need gradients; else it leaves second derivatives out in silence.
    if not torch.compiler.is_compiling() and is_compiled(field):
        raise NotImplementedError("torch.compile has no double backward")
    with torch.enable_grad():
        z = z.requires_grad_()
        f = call_field(field, z.clone())  # some networks begin with an operation in place
        if not f.requires_grad:
            return torch.zeros_like(z), f
        total = (f * score).sum()
        for probe in probes:
            (pulled,) = torch.autograd.grad(f, z, probe, create_graph=True, allow_unused=True)
            total = total + (_or_zeros(pulled, z) * probe).sum()
        (gradient,) = torch.autograd.grad(total, z, allow_unused=True)
    return _or_zeros(gradient, z).detach(), f


def _forward(
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


def _central(
    field: Field, z: Tensor, score: Tensor, probes: Iterator[Tensor], scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    step = central_step(field, z, scale)

    def pulled(point: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = point.requires_grad_()
            f = call_field(field, point.clone())  # some networks begin with an operation in place
            if not f.requires_grad:
                return torch.zeros_like(z), f
            (gradient,) = torch.autograd.grad(f, point, cotangent, allow_unused=True)
        return _or_zeros(gradient, z), f.detach()

    gradient, value, count, moving = torch.zeros_like(z), torch.zeros_like(z), 0, score
    for probe in probes:
        # Both sides see the same dropout mask: a difference of masks over a small step would be noise.
        state = _random_state(z.device)
        forward, f_forward = pulled(z + step * probe, probe + step * moving)
        _set_random_state(z.device, state)
        backward, f_backward = pulled(z - step * probe, probe - step * moving)
        gradient = gradient + (forward - backward) / (2 * step)
        value, count = value + f_forward + f_backward, count + 2
        moving = torch.zeros_like(score)
    return gradient, value / count


def central_step(field: Field, z: Tensor, scale: Tensor | float) -> Tensor:
    """Step of the central difference, by the precision that the field computes in.

    That is seen from autocast around the loss, or from half-precision parameters; not from autocast within the field.
    """
    half = torch.is_autocast_enabled(z.device.type) or any(
        parameter.dtype in (torch.float16, torch.bfloat16)
        for network in networks_of(field)
        for parameter in network.parameters()
    )
    step = torch.as_tensor((RELATIVE_STEP_HALF if half else RELATIVE_STEP) * scale, dtype=z.dtype, device=z.device)
    # A power of two: z ± step ε is then exact even where z is far from the origin, as ε has components 0 and ±1.
    return torch.exp2(torch.log2(step).round())


def _random_state(device: torch.device) -> Tensor | None:
    if torch.compiler.is_compiling():  # a compiled graph cannot replay random numbers; see "central" above
        return None
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor | None) -> None:
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
