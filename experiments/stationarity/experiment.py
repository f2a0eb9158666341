"""Stationarity: a learned field that is no gradient keeps a mixture over long runs from a bad start."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.registry import Experiment, check_sizes
from experiments.common.results import Figure, Result
from experiments.common.run import Run
from experiments.stationarity.checks import (
    Bins,
    Field,
    causal_solution,
    field_current,
    jacobian,
    residual,
    root_mean_square,
    skewness,
    total_variation,
)
from experiments.stationarity.figures import draw_current, draw_distance, draw_histograms, draw_residual
from experiments.stationarity.rollout import Rollout, roll_out
from experiments.stationarity.training import OBJECTIVES, make_field, train

RADIUS = 1.8
VARIANCE = 0.625  # of a component of p_σ: that of the data plus σ²
KERNEL_VARIANCE = 0.4  # σ²
BINS = Bins(limit=7.0, count=35)
START = (6.0, 6.0)
EXACT_SAMPLES = 16

NOTES = (
    "Jacobians and residuals are averaged over exact samples of p_σ; the residual is computed on the exact density, "
    "not on a kernel estimate.",
    "The exact score has the same step size and chains as the learned fields: its distance shows what discretization "
    "alone costs.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        data: training samples.
        batch: samples per minibatch, which are also the reference points of the kernel density estimate.
        steps: steps of the optimizer.
        learning_rate: learning rate of Adam at the start; it falls to zero along a cosine.
        hidden: width of the networks.
        log_every: training steps between rows and checkpoints.
        chains: chains of a long run.
        step_size: η of the unadjusted Langevin dynamics.
        segment: steps of a long run between rows and checkpoints.
        segments: length of a long run in segments.
        points: exact samples for averages over p_σ.
    """

    data: int = 50_000
    batch: int = 512
    steps: int = 3000
    learning_rate: float = 5e-3
    hidden: int = 64
    log_every: int = 100
    chains: int = 16_384
    step_size: float = 0.02
    segment: int = 50
    segments: int = 40
    points: int = 20_000

    def __post_init__(self) -> None:
        check_sizes(self, segment=2, segments=2, batch=2)


@dataclass(frozen=True)
class Found:
    """Everything that was measured.

    Attributes:
        mixture: p_σ.
        fields: "flux" and "dsm" (trained), "causal" and "score" (exact).
        untrained: the field before training.
        exact: total-variation distances of exact samples.
        measured: a row for every field and the untrained one: skewness, residual, error.
        rollouts: long runs by field.
        distances: (time, total-variation distance) along them.
        currents: probability currents from the paths.
        predicted: p (f - s) of the trained fields.
    """

    mixture: GaussianMixture
    fields: dict[str, Field]
    untrained: Field
    exact: list[float]
    measured: dict[str, dict[str, Any]]
    rollouts: dict[str, Rollout]
    distances: dict[str, list[tuple[float, float]]]
    currents: dict[str, torch.Tensor]
    predicted: dict[str, torch.Tensor]


def make_target(run: Run) -> tuple[GaussianMixture, torch.Tensor]:
    """Make p_σ, and training samples of p_data, whose components are narrower by σ², in float32."""
    means = triangle_means(RADIUS).float().to(run.device)
    data = GaussianMixture(means, VARIANCE - KERNEL_VARIANCE).sample(run.config.data, run.generator("data"))
    return GaussianMixture(means, VARIANCE), data


def measure_exact_samples(run: Run, mixture: GaussianMixture) -> list[float]:
    """Log total-variation distances of exact samples, of the size of the chains' histograms."""
    target = BINS.probabilities(mixture).cpu()
    logged = {row["index"] for row in run.rows("exact sample")}
    for index in range(EXACT_SAMPLES):
        if index not in logged:
            sample = mixture.sample(run.config.chains, run.generator("exact sample", index))
            distance = total_variation(BINS.histogram(sample).cpu(), target)
            run.log(kind="exact sample", index=index, total_variation=distance)
    return [row["total_variation"] for row in run.rows("exact sample")]


def measure_fields(run: Run, mixture: GaussianMixture, fields: dict[str, Field]) -> dict[str, dict[str, Any]]:
    """Log skewness of the Jacobian, residual and distance to the causal solution, one row per field."""
    logged = {row["field"] for row in run.rows("field")}
    x = mixture.sample(run.config.points, run.generator("points"))
    solution = causal_solution(mixture, x)
    for name, field in fields.items():
        if name not in logged:
            run.log(
                kind="field",
                field=name,
                skewness=skewness(jacobian(field, x)),
                residual=root_mean_square(residual(field, mixture, x)),
                error=root_mean_square(field(x) - solution) / root_mean_square(solution),
            )
    return {row["field"]: row for row in run.rows("field")}


def main(run: Run) -> None:
    """Train by both losses, run four fields long, measure, draw and compare."""
    found = measure(run)
    run.summary(results(found), draw(run, found), NOTES)


def measure(run: Run) -> Found:
    """Train the fields, run their dynamics, and measure everything; skip what is on disk."""
    mixture, data = make_target(run)
    sigma = math.sqrt(KERNEL_VARIANCE)
    fields: dict[str, Field] = {name: train(run, name, data, sigma) for name in OBJECTIVES}
    fields["causal"] = functools.partial(causal_solution, mixture)
    fields["score"] = mixture.score
    untrained: Field = make_field(run, data, sigma).requires_grad_(False)

    exact = measure_exact_samples(run, mixture)
    measured = measure_fields(run, mixture, {"untrained": untrained, **fields})
    state = run.load_state() or {}
    rollouts = {name: roll_out(run, state, name, field, mixture, BINS, START) for name, field in fields.items()}
    distances = {
        name: [(row["time"], row["total_variation"]) for row in run.rows("distance") if row["field"] == name]
        for name in fields
    }
    currents = {name: rollouts[name].current.current().cpu() for name in fields}
    predicted = {name: field_current(fields[name], mixture, BINS).cpu() for name in OBJECTIVES}
    return Found(mixture, fields, untrained, exact, measured, rollouts, distances, currents, predicted)


def draw(run: Run, found: Found) -> list[Figure]:
    """Draw all figures and return them with their captions."""
    config: Config = run.config
    target = BINS.probabilities(found.mixture).cpu()
    paths = {name: run.figure(name) for name in ("histograms", "distance", "current", "residual")}

    unit = config.segment * config.step_size
    end = config.segments * unit
    times = sorted({0.0, unit, min(5 * unit, end), end})
    draw_histograms(paths["histograms"], {name: found.rollouts[name] for name in OBJECTIVES}, target, BINS, times)
    draw_distance(
        paths["distance"],
        {name: ([t for t, _ in pairs], [d for _, d in pairs]) for name, pairs in found.distances.items()},
        found.exact,
    )
    draw_current(
        paths["current"],
        {
            "learned field, from its path": found.currents["flux"],
            "learned field, $p\\,(f - s)$": found.predicted["flux"],
            "exact score, from its path": found.currents["score"],
        },
        target[:-1].reshape(BINS.count, BINS.count) / BINS.width**2,
        BINS,
    )
    fine = Bins(BINS.limit, 4 * BINS.count + 1)
    draw_residual(paths["residual"], residual_maps(found, fine), fine)
    captions = {
        "histograms": f"Histograms of {config.chains} chains that all start at {START}, outside the support: the "
        "learned causal fields of both losses, beside the exact bin probabilities of the target.",
        "distance": f"Distance to the target. Band: {EXACT_SAMPLES} exact samples of the same size.",
        "current": "Probability current; the width of the lines is its strength. Left and right: from displacements "
        "x(t+η) - x(t-η) along the stationary half of the runs, without use of the field. The run of the score has "
        "only noise.",
        "residual": "Net outflow of probability under each field: red where the target would thin out, blue where it "
        "would pile up, on the exact density.",
    }
    return [Figure(paths[name], caption) for name, caption in captions.items()]


def residual_maps(found: Found, fine: Bins) -> dict[str, torch.Tensor]:
    """Compute p r on the centers of the bins `fine`, before training and after it by both losses."""
    axis = fine.centers().to(found.mixture.means)
    x = torch.cartesian_prod(axis, axis)
    p = found.mixture.log_density(x).exp()
    fields = {
        "before training": found.untrained,
        "score matching": found.fields["dsm"],
        "Flux Matching": found.fields["flux"],
    }
    return {
        title: (p * residual(field, found.mixture, x)).reshape(fine.count, fine.count).cpu()
        for title, field in fields.items()
    }


def results(found: Found) -> list[Result]:
    """Compare with the criteria, and with the controls."""
    exact, measured = found.exact, found.measured
    level = sum(exact) / len(exact)
    distance = {name: pairs[-1][1] for name, pairs in found.distances.items()}
    skew = {name: row["skewness"] for name, row in measured.items()}
    currents, predicted = found.currents, found.predicted["flux"]
    strength = (currents["flux"].norm() / currents["score"].norm()).item()
    mismatch = ((currents["flux"] - predicted).norm() / predicted.norm()).item()
    before, after = measured["untrained"]["residual"], measured["flux"]["residual"]
    return [
        Result(
            "antisymmetric / symmetric part of the Jacobian (RMS), Flux Matching",
            f"{skew['flux']:.2f}",
            "criterion: above 0.1",
            skew["flux"] > 0.1,
        ),
        Result(
            "antisymmetric / symmetric part: score matching / exact causal field / score",
            f"{skew['dsm']:.2f} / {skew['causal']:.2f} / {skew['score']:.0e}",
        ),
        Result(
            f"total-variation distance after the long run, Flux Matching ({BINS.count}² bins)",
            f"{distance['flux']:.4f} = {distance['flux'] / level:.2f} × that of an exact sample",
            "criterion: at most 2 ×",
            distance["flux"] <= 2 * level,
        ),
        Result(
            "total-variation distance of an exact sample of the same size",
            f"{level:.4f} ({min(exact):.4f} to {max(exact):.4f})",
        ),
        Result(
            "controls with the same step size: exact score / exact causal field",
            f"{distance['score']:.4f} / {distance['causal']:.4f} "
            f"= {distance['score'] / level:.2f} × / {distance['causal'] / level:.2f} ×",
        ),
        Result(
            "total-variation distance, the causal field trained by score matching",
            f"{distance['dsm']:.4f} = {distance['dsm'] / level:.2f} ×",
            "theory: does not keep the data",
            distance["dsm"] > 2 * level,
        ),
        Result(
            "current along the run, Flux Matching / score (noise)",
            f"{strength:.1f}",
            "criterion: above 5",
            strength > 5,
        ),
        Result("relative difference between that current and p (f - s)", f"{mismatch:.3f}"),
        Result(
            "stationarity residual r on the exact density (RMS): before training / after",
            f"{before:.2f} / {after:.2f}",
            "falls",
            after < before,
        ),
        Result("stationarity residual after score matching", f"{measured['dsm']['residual']:.2f}"),
        Result(
            "relative distance to the exact causal field: before / Flux Matching / score matching",
            " / ".join(f"{measured[name]['error']:.2f}" for name in ("untrained", "flux", "dsm")),
        ),
    ]


EXPERIMENT = Experiment(
    name="stationarity",
    title="A learned field that is no gradient keeps the data distribution",
    paper="Sec. 3, Prop. 2.1 (a check that the paper does not make)",
    claim=(
        "A causal field, which no score can be, trained by Flux Matching on samples of a mixture: its Langevin "
        "dynamics, run long from outside the support, converges to the target while a probability current "
        "flows. Trained by score matching, the same field does not keep the target."
    ),
    presets={
        "smoke": Config(
            data=1000, batch=64, steps=40, hidden=16, log_every=20, chains=512, segment=10, segments=4, points=500
        ),
        "small": Config(),
        "paper": Config(
            data=200_000, batch=1024, steps=30_000, hidden=128, log_every=250, chains=131_072, step_size=0.01,
            segment=100, segments=60, points=100_000,
        ),
    },
    main=main,
)  # fmt: skip
