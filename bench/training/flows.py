"""Conditional flow matching beside other libraries: same network, data, minibatches and number of steps.

python -m bench.training.flows [--steps 2000] [--seeds 3]     prints tables, and puts them into bench/results

Compared are torchcfm and flow_matching where they are installed; neither is a dependency, and the latter's license
forbids commercial use. Every library trains on the same minibatches from the same initial weights; noise and times
are its own draws.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.training.results import begin
from experiments.common.distances import wasserstein2
from experiments.common.mixture import GaussianMixture
from fluxmatching import ExactCoupling, FlowMatching, FlowOptions, ODESolver, integrate_flow

BATCH, SAMPLES = 256, 1000
Loss = Callable[[nn.Module, Tensor, int], Tensor]  # mean loss of a minibatch x1, from a seed


class VelocityNetwork(nn.Module):
    """v(x, t): a perceptron of x and t."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.layers(torch.cat([x, t.unsqueeze(1)], 1))
        return velocity


def eight_gaussians() -> GaussianMixture:
    """Return eight Gaussians of deviation 0.2 on a circle of radius 2."""
    angles = torch.arange(8) * (torch.pi / 4)
    return GaussianMixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.04)


def ours(**settings: Any) -> Loss:
    """Return this library's loss."""

    def loss(network: nn.Module, x: Tensor, seed: int) -> Tensor:
        mean: Tensor = FlowMatching(network, **settings)(x, seed=seed)[0]
        return mean

    return loss


def of_torchcfm(matcher: str) -> Loss | None:
    """Return the loss of a class of torchcfm, or None where it is not installed."""
    module = _installed("torchcfm.conditional_flow_matching")
    if module is None:
        return None
    flow = getattr(module, matcher)(sigma=0.0)

    def loss(network: nn.Module, x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        t, x_t, velocity = flow.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (network(x_t, t) - velocity).square().sum(1).mean()

    return loss


def of_flow_matching() -> Loss | None:
    """Return the loss of flow_matching, or None where it is not installed."""
    path, schedule = _installed("flow_matching.path.affine"), _installed("flow_matching.path.scheduler")
    if path is None or schedule is None:
        return None
    flow = path.AffineProbPath(schedule.CondOTScheduler())

    def loss(network: nn.Module, x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        found = flow.sample(torch.randn_like(x), x, torch.rand(len(x)))
        return (network(found.x_t, found.t) - found.dx_t).square().sum(1).mean()

    return loss


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def variants() -> dict[str, Loss]:
    """Return the losses by name, without libraries that are not installed."""
    found: dict[str, Loss | None] = {
        "ours, independent": ours(),
        "torchcfm, independent": of_torchcfm("ConditionalFlowMatcher"),
        "flow_matching, independent": of_flow_matching(),
        "ours, stable target": ours(options=FlowOptions(stable_target=True)),
        "ours, optimal transport": ours(coupling=ExactCoupling()),
        "torchcfm, optimal transport": of_torchcfm("ExactOptimalTransportConditionalFlowMatcher"),
    }
    return {name: loss for name, loss in found.items() if loss is not None}


def train(loss: Loss, data: GaussianMixture, steps: int, seed: int) -> tuple[nn.Module, list[float], float]:
    """Return the trained network, the mean loss of each tenth of the steps, and milliseconds per step."""
    torch.manual_seed(seed)
    network = VelocityNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses = []
    begun = time.perf_counter()
    for step in range(steps):
        value = loss(network, data.sample(BATCH, generator).float(), 10_000 * seed + step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    seconds = time.perf_counter() - begun
    part = max(1, steps // 10)
    return network, [statistics.mean(losses[k : k + part]) for k in range(0, steps, part)], 1e3 * seconds / steps


def distance(network: nn.Module, data: GaussianMixture, evaluations: int, seed: int) -> float:
    """Return W2 between samples of the flow and of the data, with Euler steps."""
    generator = torch.Generator().manual_seed(5000 + seed)
    x0 = torch.randn(SAMPLES, 2, generator=generator)
    found = integrate_flow(network, x0, solver=ODESolver("euler", num_steps=evaluations))
    return wasserstein2(found, data.sample(SAMPLES, generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    data = eight_gaussians()
    floor = [wasserstein2(data.sample(SAMPLES), data.sample(SAMPLES)) for _ in range(chosen.seeds)]
    with begin("flows", torch.device("cpu")) as write:
        write(f"Eight Gaussians, batch {BATCH}, {chosen.steps} steps of Adam, {chosen.seeds} seeds; mean ± deviation.")
        write(f"W2 of {SAMPLES} samples of the data to as many others: {statistics.mean(floor):.3f}.\n")
        write("| | loss, first tenth | last tenth | W2, 4 Euler steps | W2, 64 | ms per step |")
        write("|---|---|---|---|---|---|")
        for name, loss in variants().items():
            rows = []
            for seed in range(chosen.seeds):
                network, losses, milliseconds = train(loss, data, chosen.steps, seed)
                rows.append((losses[0], losses[-1], *(distance(network, data, n, seed) for n in (4, 64)), milliseconds))
            columns = [
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
                for values in zip(*rows, strict=True)
            ]
            write(f"| {name} | " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
