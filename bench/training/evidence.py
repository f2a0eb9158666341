"""Which way to differentiate a network at the end of a chain: error, variance of the loss's gradient, and time.

python -m bench.training.evidence [--device cuda] [--problem mixture]     prints a table, puts it into bench/results

The same minibatches and random numbers for every way; time counts a step's two halves, target and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.training.problems import MIXTURE, PROBLEMS, Problem
from bench.training.results import begin, device_argument
from fluxmatching import EDMField, TruncatedExponentialHorizon, endpoint, losses
from fluxmatching.losses import flux_target

PRETRAINING = {"mixture": 1000, "springs": 300, "images": 100}
MINIBATCHES = {"mixture": 200, "springs": 24, "images": 12}


@dataclass(frozen=True)
class Way:
    """Options of a training step.

    Attributes:
        target: arguments of `flux_target`.
        half_target, half_loss: whether the network runs under autocast to bfloat16 in the target, and in the loss.
        step: of the central difference, relative to its scale; None for the library's.
        compiled: whether torch.compile makes one graph of all derivatives.
    """

    name: str
    target: dict[str, Any]
    half_target: bool = False
    half_loss: bool = False
    step: float | None = None
    compiled: bool = False


COMPILED = torch.compile(endpoint.endpoint_gradient)


def central(**options: Any) -> dict[str, Any]:
    return {"endpoint": "central", **options}


EXACT = Way("reverse", {"endpoint": "reverse"})
FLOAT32 = [
    EXACT,
    Way("forward", {"endpoint": "forward"}),
    Way("forward, compiled", {"endpoint": "forward"}, compiled=True),
    Way("**central**", central()),
    Way("central, step × 10", central(), step=0.03),
    Way("central, half of the ends", central(endpoint_share=0.5)),
    Way("central, τ from e^{-τ}", central(horizon=TruncatedExponentialHorizon())),
    Way("the same, half of the ends", central(horizon=TruncatedExponentialHorizon(), endpoint_share=0.5)),
]
BFLOAT16 = [
    Way("reverse", {"endpoint": "reverse"}, True, True),
    Way("forward", {"endpoint": "forward"}, True, True),
    Way("forward, compiled", {"endpoint": "forward"}, True, True, compiled=True),
    Way("central in float32", central(), False, True),
    Way("**central**", central(), True, True),
    Way("central, step / 3", central(), True, True, step=0.003),
    Way("central, step × 3", central(), True, True, step=0.03),
]


@dataclass
class Sums:
    """What is kept of the gradients of many minibatches."""

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


def gradient(way: Way, network: EDMField, x: Tensor, sigma: float, seed: int) -> Tensor:
    """Of the mean flux loss in the network's parameters, as one vector."""
    level = torch.tensor(sigma, device=x.device)
    at_level: Callable[[Tensor], Tensor] = lambda z: network(z, level)  # noqa: E731
    # Fused attention has no double backward and no forward mode.
    fused = way.target["endpoint"] == "central"
    steps = {} if way.step is None else {"RELATIVE_STEP": way.step, "RELATIVE_STEP_HALF": way.step}
    with (
        nullcontext() if fused else sdpa_kernel(SDPBackend.MATH),
        mock.patch.multiple(endpoint, **steps) if steps else nullcontext(),
        mock.patch.object(losses, "endpoint_gradient", COMPILED) if way.compiled else nullcontext(),
        torch.autocast(x.device.type, torch.bfloat16, enabled=way.half_target),
    ):
        target = flux_target(at_level, x, sigma**2, seed=seed, **way.target)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=way.half_loss):
        loss = target.loss(at_level).flatten(1).sum(1).mean()
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def measure(problem: Problem, sigma: float, network: EDMField, data: Tensor, minibatches: int) -> dict[str, Any]:
    """Sums by precision and way; a way that fails has the error's text instead."""
    ways = [("float32", way) for way in FLOAT32] + [("bfloat16", way) for way in BFLOAT16]
    if problem is not MIXTURE:
        # PyTorch 2.13 cannot trace forward over reverse mode through LayerNorm and GroupNorm, and what it leaves behind
        # when it fails, gradients or autocast switched off, would falsify the rest.
        ways = [(precision, way) for precision, way in ways if not way.compiled]
    sums: dict[tuple[str, str], Sums | str] = {(precision, way.name): Sums() for precision, way in ways}
    for index in range(-1, minibatches):  # the first warms up
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(index + 1))
        x = data[order[: problem.batch]]
        exact = torch.empty(0)
        for precision, way in ways:
            kept = sums[precision, way.name]
            if isinstance(kept, str):
                continue
            begun = time.perf_counter()
            try:
                found = gradient(way, network, x, sigma, seed=index + 1)
            except (RuntimeError, NotImplementedError) as error:
                sums[precision, way.name] = f"fails: {type(error).__name__}"
                print(problem.name, precision, way.name, " ".join(str(error)[:300].split()))
                continue
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
            exact = found if way is EXACT else exact
            if index >= 0:
                kept.add(found, exact, seconds)
    return {f"{precision}: {name}": kept for (precision, name), kept in sums.items()}


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
*Error*: the gradient's distance to the one of `reverse` in float32, same numbers, root-mean-square over minibatches,
over its norm. *Variance* (trace of the covariance over minibatches) and *time* of target, loss and backward pass, over
those of `reverse` in float32. Their product is what a given precision of the mean gradient costs: less is better.
`reverse` and `forward` run with PyTorch's unfused attention, the only one that they can differentiate. Networks are
trained by score matching beforehand. `torch.compile` makes one graph of all derivatives for the perceptron alone:
PyTorch 2.13 cannot trace them through LayerNorm or GroupNorm. *Ends*: `endpoint_share`; *τ from e^{-τ}*:
`TruncatedExponentialHorizon`. Bold: what `endpoint="central"` does at that precision.
"""


def print_rows(problem: Problem, device: torch.device, minibatches: int | None) -> None:
    network, data = problem.make(PRETRAINING[problem.key])
    network, data = network.to(device), data.to(device)
    for sigma in problem.sigmas:
        measured = measure(problem, sigma, network, data, minibatches or MINIBATCHES[problem.key])
        print("\n".join(rows(problem, sigma, measured)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.evidence", description=__doc__.splitlines()[0])
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
    with begin("endpoint", device, keep=options.minibatches is None) as write:
        write("# Ways to differentiate at the end of a chain\n")
        write(NOTES)
        write("| problem | way | error | variance | time | variance × time |\n|---|---|---|---|---|---|")
        for problem in PROBLEMS:
            # Each in a process of its own, so that none sees another's compiled code and memory.
            command = [sys.executable, "-m", "bench.training.evidence", "--problem", problem.key, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            write("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))


if __name__ == "__main__":
    main()
