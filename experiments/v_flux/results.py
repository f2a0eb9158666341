"""Comparison of the measurements with what theory says about fields of one path of marginals."""

from __future__ import annotations

import math
import statistics

import numpy as np

from experiments.common.results import Result
from experiments.common.run import Run
from experiments.v_flux import gaussian
from experiments.v_flux.measure import GRID, TIMES
from experiments.v_flux.training import CAUSAL, FLOW, FLOW_CAUSAL, FLUX, FLUX_FIELDS, LEAST, TURNING, VARIANTS

EXACT, EXACT_CAUSAL, EXACT_MASKED = "exact velocity", "exact causal field", "exact velocity, masked"
FIELDS = (*VARIANTS, EXACT, EXACT_CAUSAL, EXACT_MASKED)
MULTIPLE = 1.5  # of the floor: where a field counts as one that keeps the marginals


def floors(run: Run) -> dict[float, float]:
    """Return the mean W2 of independent exact samples by time."""
    return {t: statistics.mean(row["w2"] for row in run.rows("floor") if row["t"] == t) for t in TIMES}


def marginals(run: Run) -> dict[str, dict[float, float]]:
    """Return W2 to samples of p_t over the floor, by field and time."""
    floor = floors(run)
    rows = run.rows("marginal")
    return {
        name: {row["t"]: row["w2"] / floor[row["t"]] for row in rows if row["field"] == name} for name in FIELDS
    }  # fmt: skip


def euler(run: Run) -> dict[str, dict[int, float]]:
    """Return W2 to the data by field and number of Euler steps."""
    rows = run.rows("euler")
    return {name: {row["steps"]: row["w2"] for row in rows if row["field"] == name} for name in FIELDS}


def over_time(run: Run, column: str) -> dict[str, dict[float, float]]:
    """Return an average over p_t by field and time: "energy", "to_velocity" or "to_causal"."""
    rows = run.rows("average")
    return {name: {row["t"]: row[column] for row in rows if row["field"] == name} for name in FIELDS}


def integrals(run: Run, column: str) -> dict[str, float]:
    """Return the integral over t of such an average by field."""
    return {name: float(np.trapezoid([*v.values()], [*v])) for name, v in over_time(run, column).items()}


def results(run: Run) -> list[Result]:
    """Compare with the criteria, and with the exact fields."""
    return [*of_gaussian(run), *of_marginals(run), *of_energies(run), *of_euler_steps(run), *of_losses(run)]


def of_gaussian(run: Run) -> list[Result]:
    """Lines about the closed forms."""
    rows = run.rows("gaussian")
    whole = {row["field"]: row for row in rows if row["steps"] is None}
    names = " / ".join(gaussian.FIELDS)
    worst = max(whole[name]["w2"] for name in gaussian.CARRYING)
    energies = {name: whole[name]["energy"] for name in gaussian.FIELDS}
    by_steps = {
        name: [f"{row['w2']:.3f}" for row in rows if row["field"] == name and row["steps"] is not None]
        for name in gaussian.FIELDS
    }
    return [
        Result(
            "Gaussian pair, closed form: largest W2 along the path: velocity, least energy and causal / masked",
            f"{worst:.0e} / {whole[gaussian.MASKED]['w2']:.3f}",
            "theory: 0 / above 0",
            worst < 1e-6 < whole[gaussian.MASKED]["w2"],
        ),
        Result(
            f"Gaussian pair: kinetic energy of {names}",
            " / ".join(f"{value:.3f}" for value in energies.values()),
            "theory: the second is the least of the first three",
            energies[gaussian.LEAST] == min(energies[name] for name in gaussian.CARRYING),
        ),
        Result(
            f"Gaussian pair: W2 to the data in {', '.join(map(str, run.config.euler_steps))} Euler steps: {names}",
            " / ".join(", ".join(values) for values in by_steps.values()),
        ),
    ]


def of_marginals(run: Run) -> list[Result]:
    """Lines about W2 at the five times."""
    ratios, floor = marginals(run), floors(run)
    lines = [
        Result(
            f"mixture, exact samples: W2 at t = {', '.join(map(str, TIMES))}",
            ", ".join(f"{value:.3f}" for value in floor.values()),
        )
    ]
    for name in FIELDS:
        keeps = name in FLUX_FIELDS or name == FLOW
        misses = name == FLOW_CAUSAL
        worst = max(ratios[name].values())
        lines.append(
            Result(
                f"{name}: W2 over that of exact samples, at these times",
                ", ".join(f"{value:.2f}" for value in ratios[name].values()),
                f"criterion: {'at most' if keeps else 'largest above'} {MULTIPLE:g}" if keeps or misses else "–",
                worst <= MULTIPLE if keeps else worst > MULTIPLE if misses else None,
            )
        )
    return lines


def of_energies(run: Run) -> list[Result]:
    """Lines about kinetic energy, and the distance of trained fields to the exact ones."""
    energy, to_causal = integrals(run, "energy"), integrals(run, "to_causal")[CAUSAL]
    to_velocity, by_time = integrals(run, "to_velocity"), over_time(run, "to_velocity")
    unmasked = (FLUX, TURNING, LEAST, FLOW)
    ends = (GRID[0], GRID[1], GRID[-2], GRID[-1])
    return [
        Result(f"kinetic energy: {' / '.join(FIELDS)}", " / ".join(f"{energy[name]:.3f}" for name in FIELDS)),
        Result(
            f"kinetic energy: {LEAST} / {TURNING}, which begin equally",
            f"{energy[LEAST]:.3f} / {energy[TURNING]:.3f}",
            "criterion: rising",
            energy[LEAST] < energy[TURNING],
        ),
        Result(
            f"kinetic energy of {LEAST} over that of the exact velocity, the least possible",
            f"{energy[LEAST] / energy[EXACT]:.3f}",
            "criterion: 0.9 to 1.1",
            0.9 < energy[LEAST] / energy[EXACT] < 1.1,
        ),
        Result(
            f"relative distance to the exact velocity: {' / '.join(unmasked)}",
            " / ".join(f"{math.sqrt(to_velocity[name] / energy[EXACT]):.3f}" for name in unmasked),
        ),
        Result(
            f"relative distance to the exact causal field: {CAUSAL}",
            f"{math.sqrt(to_causal / energy[EXACT_CAUSAL]):.3f}",
        ),
        Result(
            f"mean squared distance to the exact velocity at t = {', '.join(map(str, ends))}: {FLUX} / {FLOW}",
            " / ".join(", ".join(f"{by_time[name][t]:.3f}" for t in ends) for name in (FLUX, FLOW)),
        ),
    ]


def of_euler_steps(run: Run) -> list[Result]:
    """Lines about W2 to the data in few steps."""
    steps = ", ".join(map(str, run.config.euler_steps))
    return [
        Result(f"{name}: W2 to the data in {steps} Euler steps", ", ".join(f"{v:.3f}" for v in found.values()))
        for name, found in euler(run).items()
    ]


def of_losses(run: Run) -> list[Result]:
    """Lines about the v-flux loss on the exact density."""
    rows = {row["field"]: row for row in run.rows("loss")}
    return [
        Result(
            f"{name}: v-flux loss × σ²/2 on the exact density, mean ± standard error",
            f"{round(rows[name]['mean'], 4) + 0.0:.4f} ± {rows[name]['error']:.4f}",  # without a minus before zero
        )
        for name in FIELDS
    ]
