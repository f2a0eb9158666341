"""Horizon and variance of the flux loss (Sec. D.1.1, D.2, Fig. 16) on a mixture of three Gaussians."""

from __future__ import annotations

import itertools
import math

import numpy as np

from experiments.common.mixture import triangle_means
from experiments.common.registry import Experiment
from experiments.common.results import Figure, Result
from experiments.common.run import Run
from experiments.horizon.estimates import Crossing
from experiments.horizon.figures import draw_bands, draw_crossing_and_loss, draw_decay, draw_tail
from experiments.horizon.measure import (
    CUT,
    ESTIMATORS,
    FIELDS,
    RADIUS,
    SHOWN,
    TILT,
    TILTED_AT,
    Config,
    Curves,
    measure_crossings,
    measure_curves,
    measure_references,
)

INTERMEDIATE = (1.0, 10.0)
ENDS = (min(SHOWN), max(SHOWN))

NOTES = (
    "The loss is shown without its importance weight 1/q(τ) and times σ⁴, so that it has no dimension.",
    "The gray dots 2 E[r(x₀) r(x_τ)] are the definition of the loss, from a chain of fine steps; they share no "
    "approximation with the two estimators.",
    "Both fields are fields at the start of training: networks whose output layer is zero, with the "
    "preconditioning of EDM and without.",
    "Both have the threefold symmetry of the mixture, so their residual has no part in the slow exchange between "
    "modes. The tilted field, the score of modes weighted 0.6, 0.2, 0.2, has such a part, and T = 4σ² cuts it off; "
    "its loss is still zero only when its weights are right.",
    "Section D.2 names chains that cross between modes as the cause of the variance. Only the single chain has the "
    "peak; the paper does not state which estimator Figure 16 shows.",
)


def results(curves: Curves, crossings: dict[float, Crossing]) -> list[Result]:
    """Compare with the paper."""
    crossed = Result(
        "chains that end in another mode, σ = 0.01 / 3 / 80",
        " / ".join(f"{100 * crossings[sigma].share:.0f} %" for sigma in SHOWN),
        "none / some / most",
        bool(crossings[0.01].share < 0.01 and 0.01 < crossings[3.0].share < 0.5 < crossings[80.0].share),
    )
    return [
        crossed,
        *(result for field in FIELDS for result in decay_results(curves, field)),
        *(tail_result(curves, field) for field in FIELDS),
        *reference_results(curves),
        *(band_result(curves, field, estimator) for field, estimator in itertools.product(FIELDS, ESTIMATORS)),
        *(ratio_result(curves, field) for field in FIELDS),
    ]


def decay_results(curves: Curves, field: str) -> list[Result]:
    """Check that the loss decays exponentially at every σ, and report the rates."""
    sigmas = curves.config.sigmas
    fits = [curves.fit(field, sigma) for sigma in sigmas]
    worst = min(range(len(fits)), key=lambda k: -math.inf if math.isnan(fits[k].r_squared) else fits[k].r_squared)
    return [
        Result(
            f"loss decays exponentially, {FIELDS[field]}: least R² over σ",
            f"{fits[worst].r_squared:.3f} (σ = {sigmas[worst]:g})",
            "approximately",
            bool(fits[worst].r_squared > 0.9),
        ),
        Result(
            f"rate of decay in τ, {FIELDS[field]}, σ = 0.01 / 3 / 80",
            " / ".join(f"{curves.fit(field, sigma).rate:.2f}" for sigma in SHOWN),
        ),
    ]


def tail_result(curves: Curves, field: str) -> Result:
    """Check that little of the loss lies beyond τ = 4."""
    shares = {sigma: curves.tail(field, sigma) for sigma in curves.config.sigmas}
    return Result(
        f"fraction of the loss beyond τ = 4, {FIELDS[field]}, σ = 0.01 / 3 / 80 (largest)",
        " / ".join(f"{100 * shares[sigma]:.2f} %" for sigma in SHOWN) + f" ({100 * max(shares.values()):.2f} %)",
        "little",
        bool(max(map(abs, shares.values())) < 0.05),
    )


def reference_results(curves: Curves) -> list[Result]:
    """Compare the cross-chain loss with the autocorrelation of r."""
    tails = (curves.tail("tilted", TILTED_AT), curves.true_tail("tilted", TILTED_AT))
    return [
        Result(
            f"fraction beyond τ = 4 for the tilted field, σ = {TILTED_AT:g}: cross-chain / autocorrelation of r",
            f"{100 * tails[0]:.1f} % / {100 * tails[1]:.0f} %",
        ),
        Result(
            f"cross-chain loss / autocorrelation of r, both up to τ = 4, {FIELDS['edm']}, σ = 0.01 / 3 / 80",
            " / ".join(f"{curves.agreement('edm', sigma):.3f}" for sigma in SHOWN),
            "1 (theory)",
        ),
    ]


def band_result(curves: Curves, field: str, estimator: str) -> Result:
    """Find the noise level at which the relative standard deviation peaks."""
    sigmas = curves.config.sigmas
    band = curves.band(field, estimator)
    at = dict(zip(sigmas, band, strict=True))
    peak = int(band.argmax())
    inside = INTERMEDIATE[0] <= sigmas[peak] <= INTERMEDIATE[1]
    # Section D.2 names crossing between modes as the cause, which affects only the single chain.
    checked = estimator == "single_chain"
    return Result(
        f"relative standard deviation, {estimator.replace('_', '-')}, {FIELDS[field]}, σ = 0.01 / 3 / 80",
        " / ".join(f"{at[sigma]:.3f}" for sigma in SHOWN) + f"; peak at σ = {sigmas[peak]:g}",
        "peaks at intermediate σ",
        bool(inside and band[peak] > 1.5 * max(at[sigma] for sigma in ENDS)) if checked else None,
    )


def ratio_result(curves: Curves, field: str) -> Result:
    """Check that the cross-chain estimator helps most at intermediate σ."""
    ratio = curves.band(field, "single_chain") / curves.band(field, "cross_chain")
    at = dict(zip(curves.config.sigmas, ratio, strict=True))
    return Result(
        f"standard deviation, single- / cross-chain, {FIELDS[field]}, σ = 0.01 / 3 / 80",
        " / ".join(f"{at[sigma]:.1f}" for sigma in SHOWN),
        "cross-chain is most useful at intermediate σ",
        bool(at[3.0] > 1.5 and at[3.0] > max(at[sigma] for sigma in ENDS)),
    )


def main(run: Run) -> None:
    """Measure the curves, draw Figure 16 and the variance against σ, and compare with the paper."""
    config: Config = run.config
    measure_curves(run)
    measure_references(run)
    crossings = measure_crossings(run)
    curves = Curves(run)

    paths = [run.figure(name) for name in ("figure16", "decay", "variance", "tail")]
    draw_crossing_and_loss(
        paths[0],
        triangle_means(RADIUS),
        {sigma: crossings[sigma] for sigma in SHOWN},
        {(sigma, name): curves.loss("edm", name, sigma) for sigma in SHOWN for name in ESTIMATORS},
        {sigma: curves.reference("edm", sigma) for sigma in SHOWN},
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
    draw_tail(paths[3], curves.with_error("tilted", TILTED_AT), curves.reference("tilted", TILTED_AT), CUT)
    figures = [
        Figure(
            paths[0],
            f"Figure 16. Top: ends of chains of {config.num_steps} Langevin steps over τ = 4. Bottom: the loss of "
            f"{FIELDS['edm']} against the horizon, ± one standard deviation over {config.minibatches} "
            f"minibatches of {config.batch}; red: the training horizon T = 4σ².",
        ),
        Figure(paths[1], "The decay on a logarithmic axis; points within two standard errors of zero are left out."),
        Figure(paths[2], "Width of the bands relative to the height of the curves, against the noise level."),
        Figure(
            paths[3],
            f"A field with wrong weights of the modes, {TILT}, at σ = {TILTED_AT:g}: its loss has a slow tail, "
            "which the cross-chain estimator, built on one Gaussian step, misses.",
        ),
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
        "smoke": Config(
            sigmas=SHOWN, batch=64, minibatches=4, points=200, num_steps=20, reference_chains=500, spacing=0.5
        ),
        "small": Config(),
        "paper": Config(
            sigmas=(0.01, 0.03, 0.1, 0.3, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0, 40.0, 80.0),
            minibatches=256,
            points=2000,
            reference_chains=200_000,
            spacing=0.125,
        ),
    },
    main=main,
)
