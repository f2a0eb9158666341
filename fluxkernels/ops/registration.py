"""Registration of ops: one schema, implementations looked up by the name of the backend, autograd by recomputing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fluxkernels import reference
from fluxkernels.backend import implementation
from fluxkernels.devices import check_derivatives_traceable, is_plain_call, needs_derivatives, no_autocast
from fluxkernels.transforms import transforms_active

Formula = Callable[..., Tensor | tuple[Tensor, ...]]


class Op:
    """`fluxkernels::name` for all backends; its last argument is `str backend`.

    Autocast is switched off inside: a kernel density estimate computed in bfloat16 has no correct digit.

    A plain call goes straight to the backend, with derivatives through `_DirectCall`: PyTorch's dispatcher takes longer
    than a small kernel.

    `torch.library` supports reverse-mode derivatives only: under `torch.func` and in forward mode a registered op would
    raise or, worse, silently lose the tangent. There the reference formula runs instead, which PyTorch can transform.

    Args:
        name: name of the op, and of its function in `fluxkernels.implementation` and every backend.
        schema: its signature.
        fake: returns empty results for tracing; takes the op's arguments.
    """

    def __init__(self, name: str, schema: str, fake: Callable[..., Any]) -> None:
        def run(*args: Any) -> Any:
            *inputs, backend = args
            with _no_autocast(inputs):
                return self.run(inputs, backend)

        self.name = name
        self.reference: Callable[..., Any] = getattr(reference, name)
        self.registered = torch.library.custom_op(f"fluxkernels::{name}", run, mutates_args=(), schema=schema)
        self.registered.register_fake(fake)

    def run(self, inputs: Sequence[Any], backend: str, **hints: Any) -> Any:
        """Call the function of a backend."""
        return getattr(implementation(backend), self.name)(*inputs, **hints)

    def __call__(self, *args: Any, **hints: Any) -> Any:
        """Call the op; hints tell a backend what it may leave out, which only a plain call can."""
        *inputs, backend = args
        if is_plain_call(inputs):
            if needs_derivatives(inputs):
                return _DirectCall.apply(self, hints, *args)
            return self.run(inputs, backend, **hints)
        if not transforms_active():
            return self.registered(*args)
        with _no_autocast(inputs):
            return self.reference(*inputs)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Differentiate the op by these functions, which are those of `torch.library.register_autograd`."""
        self.backward, self.setup_context = backward, setup_context
        self.registered.register_autograd(backward, setup_context=setup_context)


class _DirectCall(torch.autograd.Function):
    """A plain call of an op, with its derivatives."""

    @staticmethod
    def forward(ctx: Any, op: Op, hints: dict[str, Any], *args: Any) -> Any:
        *inputs, backend = args
        output = op.run(inputs, backend, **hints)
        ctx.op = op
        op.setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.op.backward(ctx, *cotangents)


def _no_autocast(inputs: Sequence[Any]) -> AbstractContextManager[object]:
    return no_autocast(next(t for t in inputs if isinstance(t, Tensor)).device)


def vector_jacobian(
    formula: Formula, inputs: Sequence[Any], needs: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """(∂formula/∂input)ᵀ cotangents for every input that `needs` it, by running `formula` again under autograd.

    The result can itself be differentiated when autograd is asked for that (create_graph=True).
    """
    check_derivatives_traceable("this backward pass")
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # A new view of each input: if two arguments are the same tensor (refs is x), each still gets its derivative.
        leaves = [
            (value.view_as(value) if higher and value.requires_grad else value.detach().requires_grad_())
            if need
            else value
            for value, need in zip(inputs, needs, strict=True)
        ]
        with _no_autocast(leaves):
            results = formula(*leaves)
        results = (results,) if isinstance(results, Tensor) else results
        used = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None and r.requires_grad]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        gradients = iter(
            torch.autograd.grad(
                [r for r, _ in used],
                wanted,
                [c for _, c in used],
                create_graph=higher,
                allow_unused=True,
            )
        )
    return [next(gradients) if need else None for need in needs]


def register_recomputed_autograd(op: Op, formula: Formula | None = None) -> None:
    """Differentiate `op` through `formula`, which takes the op's arguments and computes the same results.

    The default is the reference formula, which is the same plain PyTorch for every backend.
    """
    formula = formula or (lambda *args: op.reference(*args[:-1]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        needs = ctx.needs_input_grad[-len(inputs) :]
        return tuple(vector_jacobian(formula, inputs, needs, cotangents))

    op.register_autograd(backward, setup_context=setup_context)
