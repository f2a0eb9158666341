"""Methods to differentiate a network at the end of a chain: error, variance of the loss's gradient, and time.

python -m bench.training.evidence [--device cuda] [--problem mixture]     prints a table, puts it into bench/results

The same minibatches and random numbers for every method; the time is that of a step's two halves, target and backward
pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import run_module, timed
from bench.training.problems import MIXTURE, PROBLEMS, Problem
from bench.training.results import begin, device_argument
from fluxmatching import EDMField, FluxOptions, TruncatedExponentialHorizon, UniformHorizon
from fluxmatching.losses import second_derivatives, target

PRETRAINING = {"mixture": 1000, "springs": 300, "images": 100}
MINIBATCHES = {"mixture": 200, "springs": 24, "images": 12}


@dataclass(frozen=True)
class Method:
    """Options of a training step.

    Attributes:
        options: options of `flux_target`.
        half_target, half_loss: whether the network runs under autocast to bfloat16 in the target, and in the loss.
        step_size: step of the central difference, relative to its scale; None for that of the library.
        compiled: whether torch.compile makes one graph of all derivatives.
    """

    name: str
    options: FluxOptions
    half_target: bool = False
    half_loss: bool = False
    step_size: float | None = None
    compiled: bool = False


COMPILED = torch.compile(second_derivatives.endpoint_gradient)
# The paper's first choice; two rows take another horizon.
UNIFORM = UniformHorizon()
DOUBLE_BACKWARD = FluxOptions(horizon=UNIFORM, second_derivatives="double_backward")
FORWARD = FluxOptions(horizon=UNIFORM, second_derivatives="forward_over_reverse")


def difference(**options: Any) -> FluxOptions:
    return FluxOptions(**{"horizon": UNIFORM, "second_derivatives": "finite_difference", **options})


EXACT = Method("double_backward", DOUBLE_BACKWARD)
FLOAT32 = [
    EXACT,
    Method("forward_over_reverse", FORWARD),
    Method("forward_over_reverse, compiled", FORWARD, compiled=True),
    Method("**finite_difference**", difference()),
    Method("finite_difference, step × 10", difference(), step_size=0.03),
    Method("finite_difference, half of the ends", difference(endpoint_fraction=0.5)),
    Method("finite_difference, τ from e^{-τ}", difference(horizon=TruncatedExponentialHorizon())),
    Method("the same, half of the ends", difference(horizon=TruncatedExponentialHorizon(), endpoint_fraction=0.5)),
]
BFLOAT16 = [
    Method("double_backward", DOUBLE_BACKWARD, True, True),
    Method("forward_over_reverse", FORWARD, True, True),
    Method("forward_over_reverse, compiled", FORWARD, True, True, compiled=True),
    Method("finite_difference in float32", difference(), False, True),
    Method("**finite_difference**", difference(), True, True),
    Method("finite_difference, step / 3", difference(), True, True, step_size=0.003),
    Method("finite_difference, step × 3", difference(), True, True, step_size=0.03),
]


@dataclass
class Sums:
    """Sums over the gradients of many minibatches."""

    count: int = 0
    total: Tensor | None = None
    squares: float = 0.0
    deviations: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def add(self, gradient: Tensor, exact: Tensor, seconds: float) -> None:
        gradient = gradient.double()
        self.count += 1
        self.total = gradient if self.total is None else self.total + gradient
        self.squares += gradient.square().sum().item()
        self.deviations += (gradient - exact.double()).square().sum().item()
        self.seconds.append(seconds)

    @property
    def variance(self) -> float:
        """Trace of the covariance."""
        assert self.total is not None
        return (self.squares - self.total.square().sum().item() / self.count) / (self.count - 1)


def changed_library(method: Method) -> list[AbstractContextManager[Any]]:
    """Contexts in which the library differentiates by that method."""
    contexts: list[AbstractContextManager[Any]] = []
    if method.options.second_derivatives != "finite_difference":
        contexts.append(sdpa_kernel(SDPBackend.MATH))  # fused attention has no double backward and no forward mode
    if method.step_size is not None:
        sizes: dict[str, Any] = {"RELATIVE_STEP": method.step_size, "RELATIVE_STEP_HALF": method.step_size}
        contexts.append(mock.patch.multiple(second_derivatives, **sizes))
    if method.compiled:
        contexts.append(mock.patch.object(target, "endpoint_gradient", COMPILED))
    return contexts


def gradient(method: Method, network: EDMField, x: Tensor, sigma: float, seed: int) -> Tensor:
    """Gradient of the mean flux loss in the network's parameters, as one vector."""
    level = torch.tensor(sigma, device=x.device)
    at_level: Callable[[Tensor], Tensor] = lambda z: network(z, level)  # noqa: E731
    with ExitStack() as stack:
        for context in changed_library(method):
            stack.enter_context(context)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=method.half_target):
            found = target.flux_target(at_level, x, sigma, method.options, seed=seed)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=method.half_loss):
        loss = found.loss(at_level).mean()
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def methods_for(problem: Problem) -> list[tuple[str, Method]]:
    """Methods with their precision."""
    methods = [("float32", method) for method in FLOAT32] + [("bfloat16", method) for method in BFLOAT16]
    if problem is MIXTURE:
        return methods
    # PyTorch 2.13 cannot trace forward over reverse mode through LayerNorm and GroupNorm, and what it leaves behind
    # when it fails, gradients or autocast switched off, would falsify the rest.
    return [(precision, method) for precision, method in methods if not method.compiled]


def measure(problem: Problem, sigma: float, network: EDMField, data: Tensor, minibatches: int) -> dict[str, Any]:
    """Sums by precision and method; a method that fails has the error's text instead."""
    methods = methods_for(problem)
    sums: dict[tuple[str, str], Sums | str] = {(precision, method.name): Sums() for precision, method in methods}
    for index in range(-1, minibatches):  # the first warms up
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(index + 1))
        x = data[order[: problem.batch]]
        exact = torch.empty(0)
        for precision, method in methods:
            so_far = sums[precision, method.name]
            if isinstance(so_far, str):
                continue
            try:
                found, seconds = timed(
                    lambda method=method, x=x, seed=index + 1: gradient(method, network, x, sigma, seed)  # type: ignore[misc]
                )
            except (RuntimeError, NotImplementedError) as error:
                sums[precision, method.name] = f"fails: {type(error).__name__}"
                print(problem.name, precision, method.name, " ".join(str(error)[:300].split()))
                continue
            exact = found if method is EXACT else exact
            if index >= 0:
                so_far.add(found, exact, seconds)
    return {f"{precision}: {name}": found for (precision, name), found in sums.items()}


def rows(problem: Problem, sigma: float, measured: dict[str, Any]) -> list[str]:
    base = measured[f"float32: {EXACT.name}"]
    lines = []
    for name, sums in measured.items():
        head = f"| {problem.name}, σ = {sigma} | {name} |"
        if isinstance(sums, str):
            lines.append(f"{head} {sums} | | | |")
            continue
        deviation = (sums.deviations / base.squares) ** 0.5
        variance = sums.variance / base.variance
        seconds = statistics.median(sums.seconds) / statistics.median(base.seconds)
        # Other ends or other τ are other random numbers: no error, but variance.
        same_numbers = "ends" not in name and "τ" not in name
        lines.append(
            f"{head} {f'{deviation:.0e}' if same_numbers else '–'} | {variance:.2f} | {seconds:.2f} | "
            f"{variance * seconds:.2f} |"
        )
    return lines


NOTES = """\
*Error*: the gradient's distance to the one of `double_backward` in float32, same numbers, root-mean-square over
minibatches, over its norm. *Variance* (trace of the covariance over minibatches) and *time* of target, loss and
backward pass, over those of `double_backward` in float32. Their product is the cost of a given precision of the mean
gradient: less is better. `double_backward` and `forward_over_reverse` run with PyTorch's unfused attention, the only
one that they can differentiate. Networks are trained by score matching beforehand. `torch.compile` makes one graph of
all derivatives for the perceptron alone: PyTorch 2.13 cannot trace them through LayerNorm or GroupNorm. *Ends*:
`endpoint_fraction`; *τ from e^{-τ}*: `TruncatedExponentialHorizon`. Bold: the library's step of `finite_difference` at
that precision.
"""


def print_rows(problem: Problem, device: torch.device, minibatches: int | None) -> None:
    network, data = problem.make(PRETRAINING[problem.key])
    network, data = network.to(device), data.to(device)
    for sigma in problem.sigmas:
        measured = measure(problem, sigma, network, data, minibatches or MINIBATCHES[problem.key])
        print("\n".join(rows(problem, sigma, measured)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--problem", choices=sorted(MINIBATCHES), help="one of them alone, its rows printed and not kept"
    )
    parser.add_argument("--minibatches", type=int, help="of each problem, instead of 200, 24 and 12; not kept")
    options = parser.parse_args()
    device = device_argument(parser, options.device)
    if options.minibatches is not None and options.minibatches < 2:
        parser.error(f"--minibatches must be at least 2, got {options.minibatches}")
    if options.problem:
        print_rows(next(p for p in PROBLEMS if p.key == options.problem), device, options.minibatches)
        return
    with begin("second-derivatives", device, keep=options.minibatches is None) as write:
        write("# Methods to differentiate at the end of a chain\n")
        write(NOTES)
        write("| problem | method | error | variance | time | variance × time |\n|---|---|---|---|---|---|")
        for problem in PROBLEMS:
            # Each in a process of its own, so that none sees another's compiled code and memory.
            done = run_module("bench.training.evidence", "--problem", problem.key, *sys.argv[1:])
            write("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))


if __name__ == "__main__":
    main()
