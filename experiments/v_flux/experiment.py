"""One path of marginals, several fields that carry it: v-Flux Matching (Appendix E, Fig. 17)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.v_flux import figures, gaussian
from experiments.v_flux.measure import SOLVER, TIMES, Field, carry, fresh, measure, measure_floor, starts
from experiments.v_flux.mixture import MixtureFlow
from experiments.v_flux.results import (
    EXACT,
    EXACT_CAUSAL,
    EXACT_MASKED,
    euler,
    floors,
    integrals,
    marginals,
    results,
)
from experiments.v_flux.training import VARIANTS, train
from fluxmatching import integrate_flow

MEANS = ((-1.0, 1.0), (0.0, -1.0), (1.0, 1.0))
VARIANCE = 0.2  # of a component of the data
LIMIT = 3.2  # half the side of the figures' panels
RADII = (0.6, 1.3, 2.0)  # of the circles where trajectories of the figures start
FRAMES = 41  # points of a trajectory


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        correlation: ρ of the Gaussian pair, 0 < ρ < 1.
        data: training samples, all of which are reference points of the density estimate.
        batch, steps, lr, ema: training with Adam; the learning rate falls to zero along a cosine.
        width: width of the networks.
        start, end: times of the training are uniform between them.
        energy_weight: λ of the least-energy variant.
        turn: rotation with which the turning variant starts, in radians per unit of time.
        samples: trajectories that are compared with samples of p_t.
        euler_steps: numbers of Euler steps.
        floor_samples: exact samples per time whose W2 is measured.
        points: exact samples per time of averages over p_t.
        loss_batch, loss_repeats: evaluations of the loss: samples per time, and number of evaluations.
    """

    correlation: float = 0.8
    data: int = 4096
    batch: int = 512
    steps: int = 4000
    lr: float = 3e-3
    ema: float = 0.998
    width: int = 64
    start: float = 0.02
    end: float = 0.95
    energy_weight: float = 0.01
    turn: float = 2.0
    samples: int = 2000
    euler_steps: tuple[int, ...] = (2, 4, 8)
    floor_samples: int = 4
    points: int = 4000
    loss_batch: int = 256
    loss_repeats: int = 16

    def __post_init__(self) -> None:
        check_sizes(self, data=self.batch, ema=0, loss_batch=8, loss_repeats=2)
        if not self.euler_steps:
            raise ValueError("euler_steps must not be empty")
        if self.correlation >= 1 or self.ema >= 1:
            raise ValueError(f"correlation and ema must be below 1, got {self.correlation} and {self.ema}")
        if not self.start < self.end < 1:
            raise ValueError(f"start < end < 1 must hold, got {self.start} and {self.end}")


def main(run: Run) -> None:
    """Study the closed forms, train the fields, measure, draw and compare."""
    pair = gaussian.make_pair(run.config.correlation)
    gaussian.study(run, pair, torch.tensor((0.0, *TIMES), dtype=torch.float64))
    flow = make_flow(run)
    data = flow.sample(1.0, run.config.data, run.generator("data"))
    fields: dict[str, Field] = {name: train(run, name, data) for name in VARIANTS}
    fields |= {EXACT: flow.velocity, EXACT_CAUSAL: flow.causal, EXACT_MASKED: flow.masked_velocity}
    measure_floor(run, flow)
    for name in run.bar(fields, "measure"):
        measure(run, flow, name, fields[name])
    run.summary(
        results(run),
        draw(run, pair, flow, fields),
        (
            f"Learned fields were trained at times from {run.config.start} to {run.config.end} and are integrated "
            f"from 0 to 1, by {SOLVER.num_steps} steps of the classical Runge-Kutta method.",
        ),
    )


def make_flow(run: Run) -> MixtureFlow:
    """Make the path to the data of this experiment, on the device of the run."""
    return MixtureFlow(torch.tensor(MEANS, dtype=torch.float64, device=run.device), VARIANCE)


def draw(run: Run, pair: gaussian.GaussianPair, flow: MixtureFlow, fields: dict[str, Field]) -> list[Figure]:
    """Draw all figures and return them with their captions."""
    paths = {name: run.figure(name) for name in ("trajectories", "marginals", "comparison", "gaussian")}
    x = starts(run)
    times = torch.linspace(0, 1, FRAMES, dtype=torch.float64, device=run.device)
    shown = {name: field for name, field in fields.items() if name != EXACT_MASKED}
    rings = torch.cat([circle(radius) for radius in RADII]).to(x)
    lines = {name: integrate_flow(f, rings, times=times, solver=SOLVER).cpu() for name, f in shown.items()}
    figures.draw_trajectories(paths["trajectories"], lines, flow.at(1.0), LIMIT)
    samples = {"exact samples": torch.stack([fresh(run, flow, t) for t in TIMES])}
    samples |= {name: carry(fields[name], x) for name in VARIANTS}
    figures.draw_marginals(paths["marginals"], samples, TIMES, LIMIT)
    figures.draw_comparison(
        paths["comparison"], integrals(run, "energy"), marginals(run), euler(run), floors(run)[TIMES[-1]]
    )
    figures.draw_gaussian(paths["gaussian"], gaussian_lines(pair), [pair.covariance(t) for t in (0.0, *TIMES)])
    captions = {
        "trajectories": "Trajectories of the fields from the same starts, over the density of the data (Fig. 17).",
        "marginals": f"Histograms of {run.config.samples} points carried by the trained fields, below exact samples.",
        "comparison": "Kinetic energy (dashed: the least possible); W2 along the path; W2 to the data in few Euler "
        "steps (dotted: exact samples).",
        "gaussian": "Gaussian pair, closed form: trajectories from one circle, over ellipses of the marginals.",
    }
    return [Figure(paths[name], caption) for name, caption in captions.items()]


def gaussian_lines(pair: gaussian.GaussianPair) -> dict[str, Tensor]:
    """Trajectories of the linear fields from a circle of radius 1.5."""
    times = torch.linspace(0, 1, FRAMES, dtype=torch.float64)
    return {name: gaussian.trajectory(matrix, pair, circle(1.5), times) for name, matrix in gaussian.FIELDS.items()}


def circle(radius: float) -> Tensor:
    """Twelve points of a circle, `[12, 2]`, float64."""
    angle = torch.arange(12, dtype=torch.float64) * (torch.pi / 6)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


EXPERIMENT = Experiment(
    name="v_flux",
    title="One path of marginals, several fields that carry it",
    paper="E, Fig. 17",
    claim=(
        "Fields trained by v-Flux Matching carry the same marginals along different trajectories: with the least "
        "kinetic energy, with a rotation, or under a causal mask. Conditional flow matching under the same mask "
        "misses the marginals."
    ),
    presets={
        "smoke": Config(
            data=128, batch=64, steps=4, width=8, samples=64, floor_samples=2, points=64, loss_batch=8, loss_repeats=2
        ),
        "small": Config(),
        "paper": Config(
            data=16_384, batch=1024, steps=40_000, lr=2e-3, ema=0.999, width=128, samples=4000, floor_samples=16,
            points=40_000, loss_batch=1024, loss_repeats=32,
        ),
    },
    main=main,
)  # fmt: skip
