"""Horizon and variance of the flux loss (Sec. D.1.1, D.2, Fig. 16) on a mixture of three Gaussians."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from experiments.common.mixture import triangle_means
from experiments.common.registry import Experiment
from experiments.common.run import Figure, Result, Run
from experiments.horizon.estimates import (
    Array,
    Crossing,
    ExponentialFit,
    Field,
    autocorrelation,
    cross_modes,
    fit_exponential,
    loss_at,
    relative_band,
    share_beyond,
)
from experiments.horizon.figures import draw_bands, draw_crossing_and_loss, draw_decay

RADIUS = 8.0  # neighbouring means are 13.9 apart, 4.6 σ at σ = 3: the modes begin to overlap there
SHOWN = (0.01, 3.0, 80.0)  # Figure 16
CUT = 4.0  # T = 4σ²
FIT_FROM = 0.25
INTERMEDIATE = (1.0, 10.0)
ESTIMATORS = ("cross_chain", "single_chain")
FIELDS = {"edm": "f = -x / (σ² + σ_data²)", "zero": "f = 0"}

NOTES = (
    "The loss is shown without its importance weight 1/q(τ) and times σ⁴, which makes it free of a dimension.",
    "The grey dots 2 E[r(x₀) r(x_τ)] are the loss by its definition, from a chain of fine steps; they share no "
    "approximation with the two estimators.",
    "Both fields are fields at the start of training: networks whose output layer is zero, with the "
    "preconditioning of EDM and without.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        sigmas: noise levels; must contain those of Figure 16.
        batch: samples a minibatch.
        minibatches: independent minibatches at each τ.
        points: chains behind the dots of the top row.
        steps: Langevin steps of those chains.
        reference_chains: chains of fine steps behind the autocorrelation of r.
        spacing: of the horizons up to 4; twice that from 4 to 8.
    """

    sigmas: tuple[float, ...] = (0.01, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 80.0)
    batch: int = 256
    minibatches: int = 32
    points: int = 1000
    steps: int = 100
    reference_chains: int = 20_000
    spacing: float = 0.25

    def __post_init__(self) -> None:
        if not set(SHOWN) <= set(self.sigmas):
            raise ValueError(f"sigmas must contain {SHOWN}, got {self.sigmas}")
        if min(self.sigmas) <= 0:
            raise ValueError(f"sigmas must be positive, got {self.sigmas}")
        if not 0 < self.spacing <= 0.5 or CUT / (2 * self.spacing) % 1:
            raise ValueError(f"spacing must be 2 divided by an integer, at most 0.5, got {self.spacing}")
        least = {"minibatches": 2, "reference_chains": 2}
        for name in ("batch", "minibatches", "points", "steps", "reference_chains"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {getattr(self, name)}")

    @property
    def taus(self) -> tuple[float, ...]:
        """The horizons, from 0 to 8."""
        near = np.arange(round(CUT / self.spacing)) * self.spacing
        return (*near.tolist(), *(CUT + np.arange(round(CUT / (2 * self.spacing)) + 1) * 2 * self.spacing).tolist())


def make_field(name: str, sigma: float) -> Field:
    """The untrained field at a noise level: "edm" or "zero"."""
    if name == "zero":
        return torch.zeros_like
    # The means have the variance RADIUS² / 2 in each direction, and their mean is zero.
    total = sigma**2 + RADIUS**2 / 2
    return lambda x: -x / total


def measure_curves(run: Run) -> None:
    """Mean and standard deviation of the loss at every field, estimator, σ and τ; no row on disk is redone."""
    config: Config = run.config
    means = triangle_means(RADIUS).to(run.device)
    done = {(row["field"], row["estimator"], row["sigma"], row["tau"]) for row in run.rows("loss")}
    cases = list(itertools.product(FIELDS, ESTIMATORS, config.sigmas, config.taus))
    for case in run.bar(cases, "loss against the horizon"):
        if case in done:
            continue
        field, estimator, sigma, tau = case
        losses = loss_at(
            make_field(field, sigma),
            means,
            sigma,
            tau,
            estimator=estimator,
            batch=config.batch,
            minibatches=config.minibatches,
            generator=run.generator("loss", field, estimator, str(sigma), str(tau)),
            backend=run.backend,
        )
        run.log(
            kind="loss", field=field, estimator=estimator, sigma=sigma, tau=tau, mean=losses.mean(), std=losses.std()
        )


def measure_references(run: Run) -> None:
    """The autocorrelation of r at the noise levels of Figure 16; no row on disk is redone."""
    config: Config = run.config
    done = {(row["sigma"], row["tau"]) for row in run.rows("autocorrelation")}
    for sigma in run.bar(SHOWN, "autocorrelation of r"):
        if (sigma, config.taus[-1]) in done:
            continue
        values, errors = autocorrelation(
            make_field("edm", sigma),
            triangle_means(RADIUS).to(run.device),
            sigma,
            config.taus,
            config.reference_chains,
            run.generator("autocorrelation", str(sigma)),
            run.backend,
        )
        for tau, value, error in zip(config.taus, values, errors, strict=True):
            if (sigma, tau) not in done:
                run.log(kind="autocorrelation", field="edm", sigma=sigma, tau=tau, mean=value, error=error)


def measure_crossings(run: Run) -> dict[float, Crossing]:
    """Chains of Figure 16's top row, and a row with the share that crossed, for every noise level."""
    config: Config = run.config
    done = {row["sigma"] for row in run.rows("crossing")}
    crossings = {}
    for sigma in config.sigmas:
        crossings[sigma] = cross_modes(
            triangle_means(RADIUS).to(run.device),
            sigma,
            CUT,
            config.steps,
            config.points,
            run.generator("crossing", str(sigma)),
            run.backend,
        )
        if sigma not in done:
            run.log(kind="crossing", sigma=sigma, share=crossings[sigma].share)
    return crossings


class Curves:
    """The measured curves by field, estimator and σ, and what is read off them."""

    def __init__(self, run: Run) -> None:
        self.config: Config = run.config
        self._loss = {
            (row["field"], row["estimator"], row["sigma"], row["tau"]): (row["mean"], row["std"])
            for row in run.rows("loss")
        }
        self._reference = {
            (row["sigma"], row["tau"]): (row["mean"], row["error"]) for row in run.rows("autocorrelation")
        }
        self.tau = np.array(self.config.taus)

    def loss(self, field: str, estimator: str, sigma: float) -> tuple[Array, Array, Array]:
        """(τ, mean, standard deviation over minibatches)."""
        found = np.array([self._loss[field, estimator, sigma, tau] for tau in self.config.taus])
        return self.tau, found[:, 0], found[:, 1]

    def with_error(self, field: str, sigma: float) -> tuple[Array, Array, Array]:
        """(τ, mean, standard error of the mean) of the cross-chain loss."""
        tau, mean, std = self.loss(field, "cross_chain", sigma)
        return tau, mean, std / math.sqrt(self.config.minibatches)

    def reference(self, sigma: float) -> tuple[Array, Array, Array]:
        """(τ, mean, standard error) of the autocorrelation of r."""
        found = np.array([self._reference[sigma, tau] for tau in self.config.taus])
        return self.tau, found[:, 0], found[:, 1]

    def fit(self, field: str, sigma: float) -> ExponentialFit:
        """Of the cross-chain loss over 0.25 ≤ τ ≤ 4."""
        return fit_exponential(*self.with_error(field, sigma), FIT_FROM, CUT)

    def tail(self, field: str, sigma: float) -> float:
        """Share of the cross-chain loss beyond τ = 4."""
        return share_beyond(self.tau, self.loss(field, "cross_chain", sigma)[1], CUT)

    def band(self, field: str, estimator: str) -> Array:
        """Relative band at each noise level."""
        return np.array([relative_band(*self.loss(field, estimator, sigma), CUT) for sigma in self.config.sigmas])


def results(curves: Curves, crossings: dict[float, Crossing]) -> list[Result]:
    """The quantities compared with the paper."""
    sigmas = np.array(curves.config.sigmas)
    ends = (min(SHOWN), max(SHOWN))
    found = [
        Result(
            "chains that end in another mode, σ = 0.01 / 3 / 80",
            " / ".join(f"{100 * crossings[sigma].share:.0f} %" for sigma in SHOWN),
            "none / some / most",
            bool(crossings[0.01].share < 0.01 and 0.01 < crossings[3.0].share < 0.5 < crossings[80.0].share),
        )
    ]
    for field, name in FIELDS.items():
        fits = [curves.fit(field, sigma) for sigma in sigmas]
        worst = min(range(len(fits)), key=lambda k: fits[k].r_squared)
        found.append(
            Result(
                f"loss decays exponentially, {name}: least R² over σ",
                f"{fits[worst].r_squared:.3f} (σ = {sigmas[worst]:g})",
                "approximately",
                bool(fits[worst].r_squared > 0.9),
            )
        )
        rates = " / ".join(f"{curves.fit(field, sigma).rate:.2f}" for sigma in SHOWN)
        found.append(Result(f"rate of decay in τ, {name}, σ = 0.01 / 3 / 80", rates))
    for field, name in FIELDS.items():
        shares = {sigma: curves.tail(field, sigma) for sigma in sigmas}
        found.append(
            Result(
                f"share of the loss beyond τ = 4, {name}, σ = 0.01 / 3 / 80 (most)",
                " / ".join(f"{100 * shares[sigma]:.2f} %" for sigma in SHOWN)
                + f" ({100 * max(shares.values()):.2f} %)",
                "little",
                bool(all(abs(shares[sigma]) < 0.05 for sigma in ends)),
            )
        )
    for (field, name), estimator in itertools.product(FIELDS.items(), ESTIMATORS):
        band = curves.band(field, estimator)
        peak = int(band.argmax())
        at = {sigma: band[list(sigmas).index(sigma)] for sigma in SHOWN}
        inside = INTERMEDIATE[0] <= sigmas[peak] <= INTERMEDIATE[1]
        # Section D.2 names crossing between modes as the cause, from which only the single chain suffers.
        checked = estimator == "single_chain"
        found.append(
            Result(
                f"relative standard deviation, {estimator.replace('_', '-')}, {name}, σ = 0.01 / 3 / 80",
                " / ".join(f"{at[sigma]:.3f}" for sigma in SHOWN) + f"; peak at σ = {sigmas[peak]:g}",
                "peaks at intermediate σ",
                bool(inside and band[peak] > 1.5 * max(at[sigma] for sigma in ends)) if checked else None,
            )
        )
    for field, name in FIELDS.items():
        ratio = curves.band(field, "single_chain") / curves.band(field, "cross_chain")
        at = {sigma: ratio[list(sigmas).index(sigma)] for sigma in SHOWN}
        found.append(
            Result(
                f"standard deviation, single- / cross-chain, {name}, σ = 0.01 / 3 / 80",
                " / ".join(f"{at[sigma]:.1f}" for sigma in SHOWN),
                "cross-chain is most useful at intermediate σ",
                bool(at[3.0] > 1.5 and at[3.0] > max(at[sigma] for sigma in ends)),
            )
        )
    return found


def run(run: Run) -> None:
    """Measure the curves, draw Figure 16 and the variance against σ, and compare with the paper."""
    config: Config = run.config
    measure_curves(run)
    measure_references(run)
    crossings = measure_crossings(run)
    curves = Curves(run)

    paths = [run.figure(name) for name in ("figure16", "decay", "variance")]
    draw_crossing_and_loss(
        paths[0],
        triangle_means(RADIUS),
        {sigma: crossings[sigma] for sigma in SHOWN},
        {(sigma, name): curves.loss("edm", name, sigma) for sigma in SHOWN for name in ESTIMATORS},
        {sigma: curves.reference(sigma) for sigma in SHOWN},
        {sigma: curves.fit("edm", sigma) for sigma in SHOWN},
        CUT,
    )
    draw_decay(
        paths[1],
        {(field, sigma): curves.with_error(field, sigma) for field in FIELDS for sigma in config.sigmas},
        FIELDS,
        CUT,
    )
    sigmas = np.array(config.sigmas)
    draw_bands(
        paths[2],
        {(field, name): (sigmas, curves.band(field, name)) for field in FIELDS for name in ESTIMATORS},
        FIELDS,
    )
    figures = [
        Figure(
            paths[0],
            f"Figure 16. Top: ends of chains of {config.steps} Langevin steps over τ = 4. Bottom: the loss of "
            f"{FIELDS['edm']} against the horizon, ± one standard deviation over {config.minibatches} "
            f"minibatches of {config.batch}; red: the training horizon T = 4σ².",
        ),
        Figure(paths[1], "The decay on a logarithmic axis; points within two standard errors of zero are left out."),
        Figure(paths[2], "Width of the bands beside the height of the curves, against the noise level."),
    ]
    run.summary(results(curves, crossings), figures, NOTES)


EXPERIMENT = Experiment(
    name="horizon",
    title="How far to simulate: the flux loss decays in the horizon, its variance peaks where modes overlap",
    paper="Sec. D.1.1, D.2, Fig. 16",
    claim=(
        "The flux loss decays exponentially in the simulation horizon, so that little is lost beyond T = 4σ²; "
        "its variance peaks at intermediate noise levels, where chains cross between modes, and there the "
        "cross-chain estimator helps most."
    ),
    presets={
        "smoke": Config(sigmas=SHOWN, batch=64, minibatches=4, points=200, steps=20, reference_chains=500, spacing=0.5),
        "small": Config(),
        "paper": Config(
            sigmas=(0.01, 0.03, 0.1, 0.3, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0, 40.0, 80.0),
            minibatches=256,
            points=2000,
            reference_chains=200_000,
            spacing=0.125,
        ),
    },
    run=run,
)
