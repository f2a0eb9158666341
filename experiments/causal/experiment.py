"""Causal models as stationary diffusions (Appendix C.1)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.causal import figures
from experiments.causal.data import KINDS
from experiments.causal.measure import METHODS, measure
from experiments.causal.results import results
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure
from experiments.common.run import Run

NOTES = (
    "Error: root mean square over variables of the error of the predicted mean, in standard deviations of the "
    "observational data, averaged over held-out interventions. W2 is of standardized samples.",
    "All work is on the CPU, whatever the device.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        kinds: kinds of drift: linear, tanh, perceptron.
        dims: numbers of variables d.
        seeds: systems per kind and d.
        parents: variables that enter each entry of the drift, besides its own.
        samples: samples per environment.
        held_out: largest number of interventions to predict; up to half of the variables.
        known: whether the sizes of training shifts are known; else they are fitted.
        methods: losses to fit with.
        costly_d: largest d for which "KDS, pairs" and "flux, smoothed" are fitted, whose cost grows fastest with d.
        fractions: strengths of the penalty, relative to that at which no edge is left.
        patience: number of strengths in a row, from the largest down, that predict worse than the best one so far and
            end the search, if that one has at most half of the error of "no effect".
        patient_d: largest d for which all strengths are tried instead.
        cosines: cosine test functions of the dual loss.
        ridge: ridge of the dual loss.
        length: length of the kernels in units of √d standard deviations (Gaussian) or one (pairs).
        pairs_samples: samples per environment in KDS for pairs, whose cost is quadratic in samples and in d.
        sigma: σ of the density estimate of the flux loss as written.
        smoothed_sigma: that of the flux loss with the drift smoothed, in units of √d.
        horizons: number of horizons of the flux loss.
        chains, smoothed_chains: chains per horizon, as written and smoothed.
        time, step: length and step of simulations.
        validation_samples: chains per simulated validation intervention.
        distance_samples: samples of which W2 is computed.
    """

    kinds: tuple[str, ...] = ("tanh", "linear")
    dims: tuple[int, ...] = (5, 20)
    seeds: int = 3
    parents: int = 2
    samples: int = 1000
    held_out: int = 5
    known: bool = True
    methods: tuple[str, ...] = METHODS
    costly_d: int = 5
    fractions: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001)
    patience: int = 2
    patient_d: int = 20
    cosines: int = 300
    ridge: float = 0.01
    length: float = 1.0
    pairs_samples: int = 500
    sigma: float = 0.5
    smoothed_sigma: float = 0.45
    horizons: int = 4
    chains: int = 250
    smoothed_chains: int = 50
    time: float = 12.0
    step: float = 0.1
    validation_samples: int = 300
    distance_samples: int = 500

    def __post_init__(self) -> None:
        check_sizes(self, dims=4, samples=50, validation_samples=2, known=0)
        for name, allowed in (("kinds", KINDS), ("methods", METHODS)):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name} must be among {', '.join(allowed)}, got {', '.join(sorted(unknown))}")
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")


def main(run: Run) -> None:
    """Fit and compare in every setting, draw, and summarize."""
    config = run.config
    settings = [(s, d, k) for s in range(config.seeds) for d in config.dims for k in config.kinds]
    for seed, d, kind in run.bar(settings, "settings"):
        measure(run, kind, d, seed)
    run.summary(results(run), draw(run), NOTES)


def draw(run: Run) -> list[Figure]:
    """Draw all figures and return them with their captions."""
    path = run.figure("methods")
    figures.draw_methods(path, run)
    return [Figure(path, "Predictions of held-out interventions, structure and cost by method; a dot per system.")]


EXPERIMENT = Experiment(
    name="causal",
    title="Causal models as stationary diffusions",
    paper="C.1",
    claim=(
        "A drift fitted by the flux loss to stationary samples under some interventions predicts others. The paper "
        "proposes this in place of the kernel deviation from stationarity (KDS), without an experiment."
    ),
    presets={
        "smoke": Config(
            kinds=("tanh",), dims=(4,), seeds=1, samples=60, fractions=(0.1, 0.01), cosines=10, pairs_samples=40,
            horizons=1, chains=20, smoothed_chains=20, time=2.0, validation_samples=20, distance_samples=50,
        ),
        "small": Config(),
        "paper": Config(
            kinds=("tanh", "perceptron", "linear"), seeds=5, known=False, dims=(5, 20, 50, 100, 200), samples=2000,
            costly_d=20,
        ),
    },
    main=main,
)  # fmt: skip
