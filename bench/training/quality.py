"""Time to a given quality of Flux Matching beside score matching, and the precision of its gradient per second.

python -m bench.training.quality [--problem mixture] [--seeds 3]     prints tables, and puts them into bench/results

Every method trains the same network from the same weights. From time to time, outside the measured seconds, samples of
the moving average are compared with new data. The result is the processor time of training until their distance falls
below a fixed mark. Times are those of one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import records
from bench.origin import Origin
from bench.training.results import begin
from experiments.common.distances import wasserstein2
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.springs.simulator import trajectories
from fluxmatching import (
    DenoisingScoreMatching,
    EDMField,
    FluxOptions,
    LogUniformNoise,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    UNet,
    UniformHorizon,
    edm_heun,
    karras_schedule,
)
from fluxmatching.networks import Perceptron, TrajectoryTransformer
from fluxmatching.training.average import MovingAverage

Make = Callable[[nn.Module, LogUniformNoise], nn.Module]


def flux(*, refs: int | None = None, **options: Any) -> Make:
    def make(field: nn.Module, noise: LogUniformNoise) -> nn.Module:
        return NoiseAnnealedFluxMatching(field, noise, FluxOptions(**options), refs=refs)

    return make


def score_matching(*, sigma_per_sample: bool) -> Make:
    def make(field: nn.Module, noise: LogUniformNoise) -> nn.Module:
        return DenoisingScoreMatching(field, noise, normalizer=LossNormalizer(), sigma_per_sample=sigma_per_sample)

    return make


DSM, FLUX = "score matching", "flux, 16 strata (default)"
METHODS: dict[str, Make] = {
    DSM: score_matching(sigma_per_sample=False),
    "score matching, a σ per sample": score_matching(sigma_per_sample=True),
    "flux, uniform horizon, double backward (paper)": flux(
        horizon=UniformHorizon(), strata=1, second_derivatives="double_backward"
    ),
    "flux, uniform horizon, 1 stratum": flux(horizon=UniformHorizon(), strata=1),
    "flux, 1 stratum": flux(strata=1),
    "flux, 4 strata": flux(strata=4),
    FLUX: flux(),
    "flux, 1024 reference points": flux(refs=1024),
}


@dataclass(frozen=True)
class Problem:
    """Data, network and marks.

    Attributes:
        data: (count, generator) -> samples.
        network: makes F(x, c_noise).
        noise: noise levels of training; sampling goes through them in `levels` Heun steps.
        batch, lr: of training.
        compared: samples that are drawn and compared.
        mark: distance W2 to be reached.
        seconds: processor time after which training is given up.
        methods: which of METHODS are measured.
    """

    data: Callable[[int, torch.Generator], Tensor]
    network: Callable[[], nn.Module]
    noise: LogUniformNoise
    batch: int
    lr: float
    compared: int
    mark: float
    seconds: float
    levels: int = 24
    methods: tuple[str, ...] = tuple(METHODS)


def digits(count: int, generator: torch.Generator) -> Tensor:
    """Handwritten digits of scikit-learn, 8 x 8, in a random order, `[count, 1, 8, 8]` from -1 to 1."""
    from sklearn.datasets import load_digits

    pictures = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    return pictures[torch.randperm(len(pictures), generator=generator)[:count]]


PROBLEMS = {
    "mixture": Problem(
        GaussianMixture(triangle_means(1.8).float(), 0.225).sample, lambda: Perceptron(2, 96),
        LogUniformNoise(0.02, 10.0), batch=256, lr=2e-3, compared=1000, mark=0.33, seconds=25.0,
    ),
    "springs": Problem(
        trajectories, lambda: TrajectoryTransformer(width=64, blocks=3, heads=4), LogUniformNoise(0.05, 40.0),
        batch=32, lr=2e-3, compared=256, mark=33.0, seconds=60.0, levels=12,
        methods=(DSM, "flux, uniform horizon, 1 stratum", "flux, 1 stratum", FLUX),
    ),
    "images": Problem(
        digits, lambda: UNet(8, 1, width=32, dropout=0.0, norm_num_groups=8, attention=(4,)),
        LogUniformNoise(0.02, 20.0), batch=64, lr=2e-3, compared=300, mark=5.5, seconds=75.0, levels=12,
        methods=(DSM, "flux, 1 stratum", FLUX),
    ),
}  # fmt: skip


class Run:
    """Training of one method from one seed, with the processor time of its steps."""

    def __init__(self, problem: Problem, method: str, seed: int, train: Tensor) -> None:
        torch.manual_seed(seed)
        self.problem, self.train, self.seed = problem, train, seed
        field = EDMField(problem.network(), train.std().item())
        self.loss = METHODS[method](field, problem.noise)
        self.average = MovingAverage(self.loss, 0.99)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=problem.lr)
        self.order = torch.Generator().manual_seed(seed)
        self.seconds, self.steps = 0.0, 0

    def step(self) -> None:
        begun = time.process_time()
        x = self.train[torch.randint(len(self.train), (self.problem.batch,), generator=self.order)]
        value, _ = self.loss(x, seed=1_000_003 * self.seed + self.steps)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.loss)
        self.seconds += time.process_time() - begun
        self.steps += 1

    @torch.no_grad()
    def distance(self, held_out: Tensor) -> float:
        noise = self.problem.noise
        levels = karras_schedule(
            self.problem.levels, float(torch.tensor(noise.low).exp()), float(torch.tensor(noise.high).exp())
        )
        start = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
        field = self.average.module.field
        assert isinstance(field, nn.Module)
        return wasserstein2(edm_heun(field.eval(), levels[0] * start, levels), held_out)


def time_to_quality(problem: Problem, method: str, seed: int) -> dict[str, Any]:
    """Train until the mark or the end of the time, looking whenever the time has grown by a fifth."""
    generator = torch.Generator().manual_seed(seed)
    train = problem.data(4096 if problem.data is not digits else 1000, generator)
    everything = problem.data(4096 + problem.compared, torch.Generator().manual_seed(seed + 100))
    held_out = everything[-problem.compared :]
    run, curve, following = Run(problem, method, seed, train), [], problem.seconds / 32
    while run.seconds < problem.seconds:
        run.step()
        if run.seconds >= following:
            curve.append((run.seconds, run.steps, run.distance(held_out)))
            following = 1.2 * run.seconds
            if curve[-1][2] <= problem.mark:
                break
    reached = curve[-1][2] <= problem.mark
    return {
        "seed": seed, "seconds": curve[-1][0] if reached else None, "steps": curve[-1][1], "curve": curve,
        "step": run.seconds / run.steps,
    }  # fmt: skip


def signal_to_noise(problem: Problem, methods: tuple[str, ...], minibatches: int = 64) -> dict[str, dict[str, float]]:
    """Return the squared signal-to-noise ratio of one minibatch's gradient of the field, and that per second.

    The field is one that score matching has trained for a fifth of the time; a random one is smoother.
    """
    train = problem.data(4096 if problem.data is not digits else 1000, torch.Generator().manual_seed(0))
    trained = Run(problem, DSM, 0, train)
    while trained.seconds < problem.seconds / 5:
        trained.step()
    found = {}
    for method in methods:
        run = Run(problem, method, 0, train)
        run.loss.load_state_dict(copy.deepcopy(trained.loss.state_dict()), strict=False)
        assert isinstance(run.loss.field, nn.Module)
        parameters = list(run.loss.field.parameters())
        total = squares = torch.zeros(())
        begun = time.process_time()
        for k in range(minibatches):
            x = train[torch.randint(len(train), (problem.batch,), generator=run.order)]
            value, _ = run.loss(x, seed=k)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
            total, squares = total + gradient, squares + gradient.square()
        seconds = (time.process_time() - begun) / minibatches
        mean = total / minibatches
        variance = (squares / minibatches - mean.square()).sum() * minibatches / (minibatches - 1)
        signal = (mean.square().sum() - variance / minibatches).clamp_min(0)
        found[method] = {"ratio": (signal / variance).item(), "per second": (signal / variance).item() / seconds}
    return found


def table(rows: dict[str, list[dict[str, Any]]], precision: dict[str, dict[str, float]]) -> list[str]:
    """Return Markdown: a line per method, times as the median over seeds."""
    lines = [
        "| method | seconds to the mark, per seed | median | of score matching | time of a step "
        "| SNR² per step | SNR² per second |",
        "|---" * 7 + "|",
    ]
    base = _median(rows[DSM])
    for method, found in rows.items():
        median = _median(found)
        seeds = ", ".join("not reached" if row["seconds"] is None else f"{row['seconds']:.1f}" for row in found)
        ratio = f"{median / base:.2f} ×" if median and base else "–"
        step = 1e3 * statistics.median(row["step"] for row in found)
        lines.append(
            f"| {method} | {seeds} | {f'{median:.1f} s' if median else '–'} | {ratio} | {step:.2f} ms "
            f"| {precision[method]['ratio']:.3g} | {precision[method]['per second']:.3g} |"
        )
    return lines


def _median(found: list[dict[str, Any]]) -> float | None:
    """Return the median time; None if fewer than half of the seeds reached the mark."""
    times = sorted(float("inf") if row["seconds"] is None else row["seconds"] for row in found)
    middle = statistics.median(times)
    return middle if middle < float("inf") else None


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=sorted(PROBLEMS), help="one of them alone")
    parser.add_argument("--seeds", type=int, default=3, help="with fewer than 3 nothing is kept")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    torch.set_num_threads(1)
    device, kept = torch.device("cpu"), options.seeds >= 3
    for name in [options.problem] if options.problem else PROBLEMS:
        problem = PROBLEMS[name]
        with begin(f"quality-{name}", device, keep=kept) as write:
            write("# Time to a given quality, beside score matching\n")
            rows = {
                method: [time_to_quality(problem, method, seed) for seed in range(options.seeds)]
                for method in problem.methods
            }
            precision = signal_to_noise(problem, problem.methods)
            write(f"{name}: W2 at most {problem.mark:g}, given up after {problem.seconds:g} s\n")
            write("\n".join(table(rows, precision)))
        if kept:
            origin = Origin.here(device)
            results = {**origin.fields(), "mark": problem.mark, "rows": rows, "precision": precision}
            records.keep(f"quality-{name}-cpu", results, origin.date)


if __name__ == "__main__":
    main()
