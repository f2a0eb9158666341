"""Fields trained to mix fast (Sec. 4.4, B.4, Fig. 6), on a mixture with exact answers and on images."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from experiments import images
from experiments.common.clock import Clock
from experiments.common.distances import wasserstein2
from experiments.common.objectives import DSM, OBJECTIVES
from experiments.common.registry import Experiment
from experiments.common.run import Figure, Result, Run, spread
from experiments.common.timing import log_steps, step_results
from experiments.fast_mixing import figures, mixture, pictures
from experiments.images import fidelity
from experiments.images.datasets import load
from experiments.images.training import make_trainer


@dataclass(frozen=True)
class Config(images.Config):
    """Sizes of the experiment: those of `images`, whose likelihood_images plays no part here, and

    Args:
        samples: of every field and number of steps.
        mixing_weight: λ of Eq. 45, for images.
        steps: predictor-corrector steps with which images are sampled.
        seeds: trainings of each field of the mixture.
        mixture_data, mixture_iterations, mixture_batch, mixture_width: of the trainings on the mixture.
        mixture_mixing_weight: λ there; with the paper's 0.01 nothing changes that can be measured.
        mixture_steps, mixture_samples: predictor-corrector steps there, and samples.
        mixture_sigma: noise level at which chains are run.
        chains, chain_steps, langevin_step: of the autocorrelation time; the step in units of σ².
    """

    samples: int = 1000
    mixing_weight: float = 0.01
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    seeds: int = 5
    mixture_data: int = 10_000
    mixture_iterations: int = 20_000
    mixture_batch: int = 256
    mixture_width: int = 128
    mixture_mixing_weight: float = 3.0
    mixture_steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    mixture_samples: int = 2000
    mixture_sigma: float = 0.7
    chains: int = 500
    chain_steps: int = 8000
    langevin_step: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.steps and self.mixture_steps):
            raise ValueError("steps and mixture_steps must not be empty")
        for name in ("batch", "mixture_batch"):
            if getattr(self, name) < 4:  # the proxy compares two halves
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}")
        if self.mixture_data < self.mixture_batch:
            raise ValueError(f"mixture_data must be at least mixture_batch, got {self.mixture_data}")

    def loss_options(self) -> dict[str, Any]:
        return {**super().loss_options(), "mixing_weight": self.mixing_weight}


def run(run: Run) -> None:
    """The mixture, the images, the figures."""
    config, clock = run.config, Clock.start(run.config.minutes)
    if config.fid:
        fidelity.check(config.inception_weights)
    data = load(config.dataset)
    log_steps(run, OBJECTIVES, lambda o, b: make_trainer(run, o, data, iterations=10**9, backend=b), config.timed_steps)
    mixture.study(run, clock)
    if not run.rows("mixture floor"):
        exact = mixture.noised(mixture.SIGMA_MIN)
        draws = [exact.sample(config.mixture_samples, run.generator("floor", k)) for k in range(2)]
        run.log(kind="mixture floor", w2=wasserstein2(*draws))
    pictures.study(run, data, clock)
    draw(run)
    run.summary(
        results(run),
        [
            Figure(run.figure("steps"), "Images: Fréchet distance on random convolutions by number of steps (Fig. 6)."),
            Figure(run.figure("pictures"), "Images from the same noise in few steps."),
            Figure(run.figure("mixture"), "Mixture: W2 to exact samples by number of steps."),
            Figure(
                run.figure("mixing"),
                "Mixture: autocorrelation time of Langevin chains, proxy, and bias of the chains.",
            ),
        ],
        (
            f"Data: {data.source}.",
            "The distance on random convolutions is no FID, and not to be compared with any.",
        ),
    )


def draw(run: Run) -> None:
    config = run.config
    by_field = {
        name: {k: run.by_seed("steps", "w2", field=name, steps=k) for k in config.mixture_steps}
        for name in (*OBJECTIVES, mixture.EXACT)
    }
    exact = run.rows("mixture floor")[0]["w2"]
    figures.draw_curves(run.figure("mixture"), by_field, exact, "exact samples", "W2 to exact samples")
    columns = [
        {name: run.by_seed("mixture", column, field=name) for name in mixture.FIELDS}
        for column in ("time", "ratio", "bias")
    ]
    figures.draw_mixing(run.figure("mixing"), *columns)
    curves = {name: {k: [distance(run, name, k)] for k in config.steps} for name in OBJECTIVES}
    floor = images.stages.floor(run, config.samples)["distance"]
    figures.draw_curves(run.figure("steps"), curves, floor, "real images", "Fréchet distance, random convolutions")
    shown = {
        name: {k: torch.load(pictures.shown_file(run, name, k), weights_only=True) for k in config.steps}
        for name in OBJECTIVES
    }
    images.figures.draw_rows(run.figure("pictures"), shown, "steps")


def distance(run: Run, name: str, steps: int, column: str = "distance") -> float:
    """Of the images of a field in so many steps; column "fid" for the FID."""
    return float(next(row[column] for row in run.rows("pictures") if (row["field"], row["steps"]) == (name, steps)))


def results(run: Run) -> list[Result]:
    """Lines of the summary."""
    config = run.config
    few = min(config.mixture_steps)
    at_few = {name: run.by_seed("steps", "w2", field=name, steps=few) for name in mixture.FIELDS}
    times = {name: run.by_seed("mixture", "time", field=name) for name in at_few}
    lines = [
        Result(
            f"mixture, {name}: autocorrelation time (σ²) / W2 of chains to p_σ / proxy",
            f"{spread(times[name], '.2f')} / {spread(run.by_seed('mixture', 'bias', field=name))} / "
            f"{spread(run.by_seed('mixture', 'ratio', field=name))}",
        )
        for name in at_few
    ]
    lines += [
        Result(
            f"mixture, {name}: W2 in {', '.join(map(str, config.mixture_steps))} steps",
            ", ".join(spread(run.by_seed("steps", "w2", field=name, steps=k)) for k in config.mixture_steps),
        )
        for name in at_few
    ]
    lines.append(Result("mixture: W2 of exact samples", f"{run.rows('mixture floor')[0]['w2']:.3f}"))
    lines.append(
        rising("mixture: autocorrelation times", {o: statistics.mean(times[o]) for o in OBJECTIVES}, ".2f", "")
    )
    known = {name: statistics.mean(times[name]) for name in mixture.KNOWN}
    proxies = {name: statistics.mean(run.by_seed("mixture", "ratio", field=name)) for name in mixture.KNOWN}
    lines.append(
        Result(
            "mixture, exact score / circulating: autocorrelation time; proxy",
            " / ".join(f"{value:.2f}" for value in known.values())
            + "; "
            + " / ".join(f"{value:.3f}" for value in proxies.values()),
            "criterion: of the faster the proxy is less",
            (known[mixture.CIRCULATING] < known[mixture.EXACT])
            == (proxies[mixture.CIRCULATING] < proxies[mixture.EXACT]),
        )
    )
    w2 = {o: statistics.mean(at_few[o]) for o in OBJECTIVES}
    lines.append(rising(f"mixture: W2 in {few} steps", w2, ".3f", " (Fig. 6)"))
    columns = [("distance", ".3f", "–"), *([("fid", ".2f", "Fig. 6")] if config.fid else [])]
    lines += [
        Result(
            f"images, {name}: {column if column == 'distance' else 'FID'} in {', '.join(map(str, config.steps))} steps",
            ", ".join(f"{distance(run, name, k, column):{digits}}" for k in config.steps),
            paper,
        )
        for column, digits, paper in columns
        for name in OBJECTIVES
    ]
    fewest = min(config.steps)
    found = {name: distance(run, name, fewest) for name in OBJECTIVES}
    lines.append(rising(f"images: distance in {fewest} steps", found, ".3f", " (Fig. 6)"))
    return lines + step_results(run, DSM)


def rising(quantity: str, values: dict[str, float], digits: str, source: str) -> Result:
    """A line that holds if fast flux is below flux, and flux below score matching."""
    fast, flux, dsm = (values[objective] for objective in OBJECTIVES)
    shown = " / ".join(f"{value:{digits}}" for value in (fast, flux, dsm))
    return Result(f"{quantity}, fast flux / flux / DSM", shown, f"criterion: rising{source}", fast < flux < dsm)


def _like(config: images.Config, **more: object) -> Config:
    return Config(**(dataclasses.asdict(config) | more))  # type: ignore[arg-type]


EXPERIMENT = Experiment(
    name="fast_mixing",
    title="Fields that mix fast, for sampling in few steps",
    paper="Sec. 4.4, B.4, Fig. 6",
    claim=(
        "With the mixing proxy added, Flux Matching learns fields whose dynamics forget faster and that sample better "
        "in few predictor-corrector steps than Flux Matching alone, and that better than score matching."
    ),
    presets={
        "smoke": _like(
            images.SMOKE, evaluations=1, steps=(2, 3), seeds=1, mixture_data=500, mixture_iterations=5,
            mixture_batch=32, mixture_width=8, mixture_steps=(2, 4), mixture_samples=50, chains=50, chain_steps=4000,
            mixture_sigma=1.5,
        ),
        "small": _like(
            images.SMALL, iterations=2000, evaluations=1, samples=500, steps=(4, 8, 16, 32), seeds=3,
            mixture_iterations=8000, mixture_batch=128,
        ),
        "paper": Config(),
    },
    run=run,
)  # fmt: skip
