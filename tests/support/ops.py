"""The table of public ops: one row per op, with all that tests, accuracy tables, fuzz runs and benchmarks need of it.

Everything that runs over all ops iterates `OPS`, everything below the public functions `KERNELS`. The rest of an op is
found by its name: the function in `fluxkernels`, its truth in `tests/support/oracles.py`, the published formula in
`tests/support/published.py`, and the rounding errors of a kernel in `tests/support/rounding.py`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fluxkernels as fk
from tests.support import oracles, published

NUM_STEPS = 4  # the ops' own default
Inputs = Mapping[str, Any]
# Inputs that are made from others where a test does not give them.
DERIVED: dict[str, Callable[[Inputs], Any]] = {
    "ref_values": lambda inputs: inputs["refs"][..., :2],  # a product would be rounded again in another dtype
    "log_weights": lambda inputs: -abs(inputs["refs"][..., 0]),
    "exclude_self": lambda inputs: False,
    "kernel": lambda inputs: "gaussian",
    "g_average": lambda inputs: value_of(inputs, "ref_values")[..., :1, :] + 0 * inputs["x"][..., :1],
    "g_no_shift": lambda inputs: inputs["x"][..., :0],
}


def value_of(inputs: Inputs, name: str) -> Any:
    """The input of this name, made from others if there is none."""
    return inputs[name] if name in inputs else DERIVED[name](inputs)


class Work(NamedTuple):
    """Least arithmetic per pair of points: exponentials, and multiply-adds per dimension.

    A distance is D multiply-adds, a weighted sum of vectors D more.
    """

    exponentials: int = 0
    multiply_adds: int = 0

    def times(self, count: int) -> "Work":
        return Work(count * self.exponentials, count * self.multiply_adds)


class Arithmetic(NamedTuple):
    """Work per pair of a query and a reference point, and per pair of a start and an end of chains."""

    estimate: Work
    transition: Work = Work()


# One evaluation of the density estimate, and of the transition. A backward pass computes the weights anew; then it
# needs an inner product with the cotangent, and sums for both points of a pair.
ONCE, BACK = Work(1, 2), Work(2, 7)


@dataclass(frozen=True)
class Kernel:
    """A function that every backend has, registered with `torch.library` under its name.

    Attributes:
        arguments: names of its inputs, in order; each is a tensor for groups `[B, ...]`, or a number of steps.
        results: names of its results.
        noise: name of the input that may be None where a seed is given.
    """

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    noise: str | None = None

    @property
    def registered(self) -> Any:
        return getattr(torch.ops.fluxkernels, self.name).default

    def variants(self, inputs: Inputs) -> dict[str, tuple[Any, ...]]:
        """Arguments by variant: with the noise given, and drawn from a seed where the kernel can do so."""
        if self.noise is None:
            return {self.name: self.of(inputs)}
        return {
            self.name: self.of({**inputs, "seed": None}),
            f"{self.name} of a seed": self.of({**inputs, self.noise: None}),
        }

    def of(self, inputs: Inputs) -> tuple[Any, ...]:
        return tuple(value_of(inputs, name) for name in self.arguments)


@dataclass(frozen=True, eq=False)
class Op:
    """A public op.

    Attributes:
        name: name of its function in `fluxkernels`.
        label: head of its column in the accuracy table.
        arguments: its arguments in order, each with the name of the input that it takes.
        kernels: what it runs in a backend.
        forward, backward: arithmetic of the op, and of op and gradient together.
        noise: name of the input that `noise=` takes, or None for an op that draws nothing.
        tolerance: largest relative error in float32 of a sound result.
        gradient_tolerance: the same for its gradient.
        twice_differentiable: whether second derivatives are supported by every backend.
        most_published: dimensions above which the published formula takes too long.
        timed_as: name in the tables of the benchmarks, where it is another one.
        judged: index of the tensor by which the op is judged, of those of `tensors`.
    """

    name: str
    label: str
    arguments: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    forward: Arithmetic
    backward: Arithmetic
    noise: str | None = None
    tolerance: float = 1e-5
    gradient_tolerance: float = 1e-5
    twice_differentiable: bool = False
    most_published: int | None = None
    timed_as: str | None = None
    judged: int = 0

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(fk, self.name)
        return found

    @property
    def truth(self) -> Callable[..., Any] | None:
        """The op in extended precision, or None where it is made of others that have a truth."""
        return getattr(oracles, self.name, None)

    @property
    def published(self) -> Callable[..., Tensor] | None:
        """The formula as published, in plain PyTorch, or None where there is none."""
        return getattr(published, self.name, None)

    @property
    def table(self) -> str:
        """Name in the tables of the benchmarks."""
        return self.timed_as or self.name

    @property
    def takes_num_steps(self) -> bool:
        return "num_steps" in inspect.signature(self.function).parameters

    def draws(self, num_steps: int = NUM_STEPS) -> int:
        """Standard normal numbers that the op takes per number of its result."""
        return {None: 0, "step_noise": 1, "chain_noise": num_steps, "pass_noise": 1 + num_steps}[self.noise]

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the inputs that the op has derivatives in: all of its tensors."""
        return (*self.arguments.values(), *([self.noise] if self.noise else []))

    def values(self, inputs: Inputs) -> list[Any]:
        """The inputs in the order of the arguments, with the noise last: what `truth` and `published` take."""
        return [value_of(inputs, name) for name in self.differentiable]

    def given(self, inputs: Inputs) -> dict[str, Any]:
        """The required arguments by name."""
        return {argument: value_of(inputs, name) for argument, name in self.arguments.items()}

    def call(self, inputs: Inputs, **options: Any) -> Any:
        """Result of the public function; the noise is that of the inputs, unless a seed is given."""
        if self.noise and "seed" not in options:
            options["noise"] = inputs[self.noise]
        return self.function(**self.given(inputs), **options)


def judged(op: Op, result: Any) -> Tensor:
    """The tensor of an op's result by which it is judged and timed."""
    return tensors(result)[op.judged]


def noises(noise: Any) -> dict[str, Any]:
    """The inputs for all kinds of noise, from that of a pass `[1 + num_steps, ..., N, D]`."""
    return {"pass_noise": noise, "chain_noise": noise[1:], "step_noise": noise[1]}


def tensors(result: Any, values: Tensor | None = None) -> tuple[Tensor, ...]:
    """All tensors of an op's result; a pass has an average too: that of `values`, by default of its last scores."""
    if isinstance(result, fk.FluxPass):
        average = result.transition_average(result.score_t if values is None else values)
        return result.x0, result.score0, result.xt, result.score_t, average
    return result if isinstance(result, tuple) else (result,)


_KDE = (
    Kernel("kde", ("x", "refs", "per_query"), ("shift", "mean", "log_density")),
    Kernel(
        "kde_backward",
        ("g_shift", "g_mean", "g_log_density", "x", "refs", "per_query"),
        ("g_z", "g_refs", "g_sigma2"),
    ),
)
_KERNEL_AVERAGE = (
    Kernel(
        "kernel_average",
        ("x", "refs", "per_query", "ref_values", "log_weights", "exclude_self", "kernel"),
        ("shift", "average", "log_sum"),
    ),
    Kernel(
        "kernel_average_backward",
        (
            *("g_no_shift", "g_average", "g_log_density"),
            *("x", "refs", "per_query", "ref_values", "log_weights", "exclude_self", "kernel"),
        ),
        ("g_z", "g_refs", "g_sigma2", "g_values", "g_log_weights"),
    ),
)
_CHAIN = Kernel(
    "langevin_chain",
    ("x", "refs", "per_group", "tau", "num_steps", "chain_noise", "seed"),
    ("chain",),
    noise="chain_noise",
)
_PASS = Kernel(
    "flux_pass",
    ("x", "refs", "per_group", "tau", "num_steps", "pass_noise", "seed"),
    ("x0", "shift0", "xt", "shift_t"),
    noise="pass_noise",
)
_WEIGHTS = Kernel("transition_weights", ("x", "shift", "xt", "per_group", "tau"), ("weights",))
_AVERAGE = Kernel("transition_average", ("x", "shift", "xt", "values", "per_group", "tau"), ("average",))

_ESTIMATE = {"x": "x", "refs": "refs", "sigma2": "per_query"}
_MOVE = {"refs": "refs", "sigma2": "per_group", "tau": "tau"}
OPS = (
    Op("kde_score", "score", _ESTIMATE, _KDE, Arithmetic(ONCE), Arithmetic(BACK), twice_differentiable=True),
    Op("kde_mean", "mean", _ESTIMATE, _KDE, Arithmetic(ONCE), Arithmetic(BACK), twice_differentiable=True),
    Op(
        "kde_log_density",
        "log density",
        {"x": "x", "refs": "refs", "sigma2": "per_group"},
        _KDE,
        Arithmetic(Work(1, 1)),
        Arithmetic(Work(2, 4)),
        twice_differentiable=True,
    ),
    Op(
        "kernel_average",
        "kernel average",
        {**_ESTIMATE, "values": "ref_values", "log_weights": "log_weights"},
        _KERNEL_AVERAGE,
        Arithmetic(ONCE),
        Arithmetic(BACK),
        twice_differentiable=True,
    ),
    Op(
        "langevin_step",
        "step",
        {"x": "x", "refs": "refs", "sigma2": "per_group", "h": "h"},
        (_CHAIN,),
        Arithmetic(ONCE),
        Arithmetic(BACK),
        noise="step_noise",
    ),
    Op(
        "langevin_chain",
        "chain",
        {"x0": "x", **_MOVE},
        (_CHAIN,),
        Arithmetic(ONCE.times(NUM_STEPS)),
        Arithmetic(BACK.times(NUM_STEPS)),
        noise="chain_noise",
    ),
    Op(
        "transition_weights",
        "weights",
        {"x0": "x", "xt": "xt", **_MOVE},
        (*_KDE, _WEIGHTS),
        Arithmetic(ONCE, Work(1, 1)),
        Arithmetic(BACK, Work(2, 4)),
    ),
    Op(
        "transition_average",
        "average",
        {"x0": "x", "xt": "xt", "values": "values", **_MOVE},
        (*_KDE, _AVERAGE),
        Arithmetic(ONCE, ONCE),
        Arithmetic(BACK, BACK),
    ),
    Op(
        "residual_gradient",
        "residual",
        {"z": "x", "field": "field", "refs": "refs", "sigma2": "per_query"},
        (Kernel("residual_gradient", ("x", "field", "refs", "per_query"), ("residual",)),),
        Arithmetic(Work(1, 4)),
        Arithmetic(Work(2, 10)),  # three points of a pair get sums: query, reference point and the field's value
        most_published=200,  # its exact divergence takes one backward pass per coordinate
    ),
    # The chain, whose first evaluation serves the transition too, and s(x_τ).
    Op(
        "flux_pass",
        "pass",
        {"x": "x", **_MOVE},
        (_PASS, _AVERAGE),
        Arithmetic(ONCE.times(NUM_STEPS + 1), ONCE),
        Arithmetic(BACK.times(NUM_STEPS + 1), BACK),
        noise="pass_noise",
        # Gradients through x_τ, which is rounded to float32 between two ops: at σ² = 0.001 the next one magnifies that.
        gradient_tolerance=1e-4,
        timed_as="flux_pass + transition_average",
        judged=-1,
    ),
)
BY_NAME = {op.name: op for op in OPS}


def with_leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, and those that ops take and that are made from others: leaves of their own that require gradients."""
    names = {name for op in OPS for name in op.arguments.values() if name in DERIVED and name not in inputs}
    return inputs | {name: DERIVED[name](inputs).detach().clone().requires_grad_() for name in sorted(names)}


KERNELS = tuple(dict.fromkeys(kernel for op in OPS for kernel in op.kernels))
