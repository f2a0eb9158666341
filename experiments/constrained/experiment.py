"""Penalties at the boundary of a constrained domain (Appendix C.2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run
from experiments.constrained import exact, figures
from experiments.constrained.domains import PROBLEMS
from experiments.constrained.measure import measure, measure_exact
from experiments.constrained.results import results
from experiments.constrained.training import SCORE, STRATA, Field, train, variants


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        problems: domains with data: "box", "simplex" and "annulus" in the plane, "box 20" and "simplex 20".
        seeds: trainings per field.
        data: training samples.
        refs: how many of them are reference points of the density estimate in the plane.
        batch, lr, ema: training with Adam; the learning rate falls to zero along a cosine.
        steps: steps of the score from a new network.
        further_steps, further_lr: steps and learning rate of all other fields, which start from the trained score.
        width: width of the networks.
        weight: λ, weight of the penalty.
        margin, gentle_margin: inward components of σ f from which on nothing is paid: one that no field with the right
            law has, and one that the score has.
        samples: chains per field.
        time: length of a chain in units of σ².
        step_sizes: step sizes of Langevin dynamics in units of σ².
    """

    problems: tuple[str, ...] = tuple(PROBLEMS)
    seeds: int = 3
    data: int = 20_000
    refs: int = 2048
    batch: int = 512
    steps: int = 400
    further_steps: int = 150
    further_lr: float = 2e-3
    lr: float = 1e-2
    ema: float = 0.99
    width: int = 64
    weight: float = 1.0
    margin: float = 1.5
    gentle_margin: float = 0.5
    samples: int = 1000
    time: float = 50.0
    step_sizes: tuple[float, ...] = (0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        check_sizes(self, data=max(self.batch, self.refs), batch=STRATA, ema=0, margin=0, gentle_margin=0, samples=2)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if not self.step_sizes or not self.problems:
            raise ValueError("step_sizes and problems must not be empty")
        if wrong := [name for name in self.problems if name not in PROBLEMS]:
            raise ValueError(f"problems must be some of {', '.join(PROBLEMS)}, got {wrong[0]!r}")


def main(run: Run) -> None:
    """Train and measure every field on every domain with every seed, compare, draw."""
    for name in run.config.problems:
        measure_exact(run, name)
    if exact.PROBLEM in run.config.problems:
        exact.study(run)
    shown: dict[tuple[str, str], Field] = {}
    for seed, name in run.bar(list(product(range(run.config.seeds), run.config.problems)), "domains"):
        score = train(run, name, SCORE, seed)
        for variant in variants(name):
            field = score if variant == SCORE else train(run, name, variant, seed, score)
            measure(run, name, variant, seed, field)
            if seed == 0 and PROBLEMS[name].domain.dim == 2:
                shown[name, variant] = field
    run.summary(results(run), draw(run, shown))


def draw(run: Run, fields: dict[tuple[str, str], Field]) -> list[Figure]:
    """Draw all figures and return them with their captions; `fields` are those of the plane, by problem and variant."""
    captions = {
        "steps": "Invalid points, and the distance of valid ones to the data, by step size; one dot per seed.",
        "price": f"Distance of valid points against invalid points at steps of {run.config.step_sizes[-1]} σ².",
    }
    figures.draw_steps(run.figure("steps"), run)
    figures.draw_price(run.figure("price"), run)
    if fields:
        captions["fields"] = "σ f inside (blue) and outside (orange) of the domain, seed 0."
        grids = {name: figures.grid_around(name) for name in dict.fromkeys(name for name, _ in fields)}
        shown = {
            (name, variant): (PROBLEMS[name].sigma * field(grids[name].to(run.device))).detach().cpu()
            for (name, variant), field in fields.items()
        }
        figures.draw_fields(run.figure("fields"), shown, grids)
    if exact.PROBLEM in run.config.problems:
        captions["exact"] = "Box in the plane, fields in closed form that leave p_σ in place; one dot per seed."
        figures.draw_exact(run.figure("exact"), run)
    return [Figure(run.figure(name), caption) for name, caption in captions.items()]


EXPERIMENT = Experiment(
    name="constrained",
    title="Penalties at the boundary of a constrained domain",
    paper="C.2",
    claim=(
        "A penalty that turns the field inward at the boundary lowers the share of invalid points of a sampler with "
        "finite steps."
    ),
    presets={
        "smoke": Config(
            problems=("box", "simplex 20"), seeds=1, data=64, refs=64, batch=32, steps=3, further_steps=2, width=8,
            samples=32, time=2.0, step_sizes=(0.2, 1.0),
        ),
        "small": Config(),
        "paper": Config(
            data=100_000, refs=16_384, batch=4096, steps=20_000, lr=3e-3, further_steps=20_000, further_lr=1e-3,
            ema=0.999, width=128, samples=4000, time=200.0,
        ),
    },
    main=main,
)  # fmt: skip
