"""Settings, measurements, and the curves made of them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.common.mixture import triangle_means
from experiments.common.run import Run
from experiments.horizon.estimates import (
    Array,
    AtHorizon,
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

RADIUS = 8.0  # neighboring means are 13.9 apart, 4.6 σ at σ = 3: the modes begin to overlap there
SHOWN = (0.01, 3.0, 80.0)  # Figure 16
CUT = 4.0  # T = 4σ²
FIT_FROM = 0.25
ESTIMATORS = ("cross_chain", "single_chain")
FIELDS = {"edm": "f = -x / (σ² + σ_data²)", "zero": "f = 0"}
TILT = (0.6, 0.2, 0.2)  # weights of the modes under the tilted field
TILTED_MINIBATCHES = 8  # times as many for this field: few samples lie where its residual does
TILTED_AT = 3.0  # at much lower σ no sample sees the difference, at higher ones nothing hinders mixing


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Args:
        sigmas: noise levels; must contain those of Figure 16.
        batch: samples per minibatch.
        minibatches: independent minibatches at each τ.
        points: chains in the top row of Figure 16, each with a dot at its end.
        num_steps: Langevin steps of those chains.
        reference_chains: chains of fine steps for the autocorrelation of r.
        spacing: distance of the horizons up to 4; from 4 to 8 it is twice as large.
    """

    sigmas: tuple[float, ...] = (0.01, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 80.0)
    batch: int = 256
    minibatches: int = 32
    points: int = 1000
    num_steps: int = 100
    reference_chains: int = 50_000
    spacing: float = 0.25

    def __post_init__(self) -> None:
        if not set(SHOWN) <= set(self.sigmas):
            raise ValueError(f"sigmas must contain {SHOWN}, got {self.sigmas}")
        if min(self.sigmas) <= 0:
            raise ValueError(f"sigmas must be positive, got {self.sigmas}")
        if not 0 < self.spacing <= 0.5 or CUT / (2 * self.spacing) % 1:
            raise ValueError(f"spacing must be 2 divided by an integer, at most 0.5, got {self.spacing}")
        least = {"minibatches": 2, "reference_chains": 2}
        for name in ("batch", "minibatches", "points", "num_steps", "reference_chains"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {getattr(self, name)}")

    @property
    def taus(self) -> tuple[float, ...]:
        """Horizons from 0 to 8."""
        near = np.arange(round(CUT / self.spacing)) * self.spacing
        return (*near.tolist(), *(CUT + np.arange(round(CUT / (2 * self.spacing)) + 1) * 2 * self.spacing).tolist())


def make_field(name: str, sigma: float) -> Field:
    """Make a field at a noise level: untrained ("edm", "zero"), or the score of modes of unequal weight ("tilted")."""
    if name == "zero":
        return torch.zeros_like
    if name == "tilted":
        return functools.partial(_tilted_score, sigma=sigma)
    # The means have the variance RADIUS² / 2 in each direction, and their mean is zero.
    total = sigma**2 + RADIUS**2 / 2
    return lambda x: -x / total


def _tilted_score(x: Tensor, sigma: float) -> Tensor:
    means = triangle_means(RADIUS).to(x)
    logits = (x.unsqueeze(-2) - means).square().sum(-1) / (-2 * sigma**2) + x.new_tensor(TILT).log()
    return (logits.softmax(-1) @ means - x) / sigma**2


def measure_curves(run: Run) -> None:
    """Log mean and standard deviation of the loss at every field, estimator, σ and τ; skip rows on disk."""
    config: Config = run.config
    means = triangle_means(RADIUS).to(run.device)
    done = {(row["field"], row["estimator"], row["sigma"], row["tau"]) for row in run.rows("loss")}
    curves = [*itertools.product(FIELDS, ESTIMATORS, config.sigmas), ("tilted", "cross_chain", TILTED_AT)]
    cases = [(*curve, tau) for curve in curves for tau in config.taus]
    for case in run.bar(cases, "loss against the horizon"):
        if case in done:
            continue
        field, estimator, sigma, tau = case
        minibatches = config.minibatches * (TILTED_MINIBATCHES if field == "tilted" else 1)
        losses = loss_at(
            AtHorizon(make_field(field, sigma), means, sigma, tau),
            estimator=estimator,
            batch=config.batch,
            minibatches=minibatches,
            generator=run.generator("loss", field, estimator, str(sigma), str(tau)),
            backend=run.backend,
        )
        run.log(
            kind="loss",
            field=field,
            estimator=estimator,
            sigma=sigma,
            tau=tau,
            mean=losses.mean(),
            std=losses.std(),
            error=losses.std() / math.sqrt(minibatches),
        )


def measure_references(run: Run) -> None:
    """Log the autocorrelation of r for Figure 16 and for the tilted field; skip rows on disk."""
    config: Config = run.config
    done = {(row["field"], row["sigma"], row["tau"]) for row in run.rows("autocorrelation")}
    cases = [*(("edm", sigma) for sigma in SHOWN), ("tilted", TILTED_AT)]
    for field, sigma in run.bar(cases, "autocorrelation of r"):
        if (field, sigma, config.taus[-1]) in done:
            continue
        values, errors = autocorrelation(
            make_field(field, sigma),
            triangle_means(RADIUS).to(run.device),
            sigma,
            config.taus,
            config.reference_chains,
            run.generator("autocorrelation", field, str(sigma)),
            run.backend,
        )
        for tau, value, error in zip(config.taus, values, errors, strict=True):
            if (field, sigma, tau) not in done:
                run.log(kind="autocorrelation", field=field, sigma=sigma, tau=tau, mean=value, error=error)


def measure_crossings(run: Run) -> dict[float, Crossing]:
    """Run the chains of Figure 16's top row, and log the fraction that crossed, for every noise level."""
    config: Config = run.config
    done = {row["sigma"] for row in run.rows("crossing")}
    crossings = {}
    for sigma in config.sigmas:
        crossings[sigma] = cross_modes(
            triangle_means(RADIUS).to(run.device),
            sigma,
            CUT,
            config.num_steps,
            config.points,
            run.generator("crossing", str(sigma)),
            run.backend,
        )
        if sigma not in done:
            run.log(kind="crossing", sigma=sigma, share=crossings[sigma].share)
    return crossings


class Curves:
    """Measured curves by field, estimator and σ, and the numbers read from them."""

    def __init__(self, run: Run) -> None:
        self.config: Config = run.config
        self._loss = {
            (row["field"], row["estimator"], row["sigma"], row["tau"]): (row["mean"], row["std"], row["error"])
            for row in run.rows("loss")
        }
        self._reference = {
            (row["field"], row["sigma"], row["tau"]): (row["mean"], row["error"]) for row in run.rows("autocorrelation")
        }
        self.tau = np.array(self.config.taus)

    def loss(self, field: str, estimator: str, sigma: float) -> tuple[Array, Array, Array]:
        """Return (τ, mean, standard deviation over minibatches)."""
        found = np.array([self._loss[field, estimator, sigma, tau] for tau in self.config.taus])
        return self.tau, found[:, 0], found[:, 1]

    def with_error(self, field: str, sigma: float) -> tuple[Array, Array, Array]:
        """Return (τ, mean, standard error of the mean) of the cross-chain loss."""
        found = np.array([self._loss[field, "cross_chain", sigma, tau] for tau in self.config.taus])
        return self.tau, found[:, 0], found[:, 2]

    def reference(self, field: str, sigma: float) -> tuple[Array, Array, Array]:
        """Return (τ, mean, standard error) of the autocorrelation of r."""
        found = np.array([self._reference[field, sigma, tau] for tau in self.config.taus])
        return self.tau, found[:, 0], found[:, 1]

    def fit(self, field: str, sigma: float) -> ExponentialFit:
        """Fit the cross-chain loss over 0.25 ≤ τ ≤ 4."""
        return fit_exponential(*self.with_error(field, sigma), FIT_FROM, CUT)

    def tail(self, field: str, sigma: float) -> float:
        """Return the fraction of the cross-chain loss up to τ = 8 that lies beyond 4."""
        return share_beyond(self.tau, self.loss(field, "cross_chain", sigma)[1], CUT)

    def true_tail(self, field: str, sigma: float) -> float:
        """Return that fraction of the autocorrelation of r."""
        return share_beyond(self.tau, self.reference(field, sigma)[1], CUT)

    def agreement(self, field: str, sigma: float) -> float:
        """Compute ∫ cross-chain loss dτ / ∫ autocorrelation dτ, both up to τ = 4."""
        near = self.tau <= CUT
        curves = (self.loss(field, "cross_chain", sigma)[1], self.reference(field, sigma)[1])
        loss, truth = (np.trapezoid(mean[near], self.tau[near]) for mean in curves)
        return float(loss / truth)

    def band(self, field: str, estimator: str) -> Array:
        """Return the relative band at each noise level."""
        return np.array([relative_band(*self.loss(field, estimator, sigma), CUT) for sigma in self.config.sigmas])
