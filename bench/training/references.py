"""Bias and deviation of a minibatch's gradient by the number of reference points.

python -m bench.training.references [--problem mixture]     prints a table, and puts it into bench/results

A field that score matching has trained receives the gradient of Flux Matching at one σ. The same minibatches and random
numbers for every number of reference points; the largest one stands for the whole distribution.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.training.problems import MIXTURE, SPRINGS, Problem
from bench.training.results import begin
from fluxmatching import EDMField, FluxOptions, flux_matching_loss

MANY = 8192
PROBLEMS = {"mixture": (MIXTURE, 1000, 400), "springs": (SPRINGS, 300, 40)}


@dataclass
class Gradients:
    """Sums over minibatches of gradients, and of their distance from those with the most reference points."""

    count: int = 0
    sums: list[Tensor | float] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    seconds: float = 0.0

    def add(self, gradient: Tensor, most: Tensor, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
        for k, value in enumerate((gradient.double(), (gradient - most).double())):
            self.sums[k] = self.sums[k] + value
            self.squares[k] += value.square().sum().item()

    def mean_square(self, k: int) -> float:
        return (torch.as_tensor(self.sums[k]) / self.count).square().sum().item()

    def variance(self, k: int) -> float:
        """Trace of the covariance of gradients (0) or of their distances (1)."""
        return (self.squares[k] / self.count - self.mean_square(k)) * self.count / (self.count - 1)

    def bias(self) -> float:
        """Norm of the mean distance, less what its noise adds."""
        return math.sqrt(max(0.0, self.mean_square(1) - self.variance(1) / self.count))


def at(network: EDMField, sigma: float, z: Tensor) -> Tensor:
    value: Tensor = network(z, torch.tensor(sigma))
    return value


def measure(problem: Problem, network: EDMField, sigma: float, sizes: tuple[int, ...], count: int) -> list[Gradients]:
    """Return the sums for every number of reference points, the last of which is the truth."""
    found = [Gradients() for _ in sizes]
    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(1)
    for k in range(count):
        points = problem.data(sizes[-1], generator)
        results = []
        for size in sizes:
            begun = time.process_time()
            x = points[: problem.batch]
            loss = flux_matching_loss(partial(at, network, sigma), x, sigma, FluxOptions(), refs=points[:size], seed=k)
            parts = torch.autograd.grad(loss.mean(), parameters)
            results.append((torch.cat([part.flatten() for part in parts]), time.process_time() - begun))
        for sums, (gradient, seconds) in zip(found, results, strict=True):
            sums.add(gradient, results[-1][0], seconds)
    return found


def lines_of(problem: Problem, sigma: float, sizes: tuple[int, ...], found: list[Gradients]) -> list[str]:
    """Return Markdown: a line per number of reference points; all in units of the mean gradient of the last."""
    unit = math.sqrt(max(found[-1].mean_square(0) - found[-1].variance(0) / found[-1].count, 0.0))
    return [
        f"| {problem.name}, batch {problem.batch} | {sigma:g} | {size} | {sums.bias() / unit:.2g} "
        f"| {math.sqrt(sums.variance(0)) / unit:.3g} | {1e3 * sums.seconds / sums.count:.3g} ms |"
        for size, sums in zip(sizes, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.references", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=sorted(PROBLEMS), help="one of them alone, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with begin("references", torch.device("cpu"), keep=options.problem is None) as write:
        write("# Bias and deviation of a gradient by the number of reference points\n")
        write("| problem | σ | reference points | bias | deviation | processor time |\n" + "|---" * 6 + "|")
        for name in [options.problem] if options.problem else PROBLEMS:
            problem, pretrained, count = PROBLEMS[name]
            sizes = (problem.batch, 2 * problem.batch, 1024, MANY)
            network, _ = problem.make(pretrained)
            for sigma in problem.sigmas:
                write("\n".join(lines_of(problem, sigma, sizes, measure(problem, network, sigma, sizes, count))))


if __name__ == "__main__":
    main()
