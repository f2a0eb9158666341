"""Comparison of the measurements with the claim, as lines of a table."""

from __future__ import annotations

import statistics

from experiments.causal.measure import (
    DUAL,
    FLUX,
    GAUSSIAN,
    METHODS,
    NO_EFFECT,
    QUADRATIC,
    SHARE,
    SMOOTHED,
    TRUTH,
    methods_at,
)
from experiments.common.results import Result, spread
from experiments.common.run import Run

COLUMNS = {"error": "error", "w2": "W2", "f1": "F1", "precision": "average precision", "seconds": "CPU seconds"}
CRITERION = f"criterion: error at most {SHARE:g} × that of no effect"


def results(run: Run) -> list[Result]:
    """Compare with the criteria and with the other methods, then list every setting and method."""
    used = [name for name in METHODS if name in run.config.methods]
    lines = [of_method(run, name) for name in used if name in (DUAL, QUADRATIC, FLUX)]
    lines += [against(run, name) for name in used if name in (DUAL, QUADRATIC) and GAUSSIAN in used]
    lines += [of_centers(run, name) for name in used if name in (FLUX, SMOOTHED)]
    violations = [row["violation"] for row in run.rows("fit") if "violation" in row]
    lines.append(Result("largest violation of the conditions of the lasso's minimum, over λ", f"{max(violations):.0e}"))
    return [*lines, *of_settings(run)]


def settings(run: Run) -> list[tuple[str, int]]:
    """Return kind and d of every setting."""
    return [(kind, d) for kind in run.config.kinds for d in run.config.dims]


def mean_error(run: Run, method: str, kind: str, d: int) -> float:
    """Return the error of predicted means of a method, averaged over the systems of a setting."""
    return statistics.mean(run.by_seed("fit", "error", setting=kind, d=d, method=method))


def names_of(run: Run) -> str:
    """Return the names of the settings, in the order of the numbers in a line."""
    return " / ".join(f"{kind}, d = {d}" for kind, d in settings(run))


def of_method(run: Run, method: str) -> Result:
    """Compare a method with the prediction that an intervention has no effect, in all settings."""
    shares = [mean_error(run, method, *of) / mean_error(run, NO_EFFECT, *of) for of in settings(run)]
    text = " / ".join(f"{share:.2f}" for share in shares)
    return Result(
        f"{method}: error over that of no effect: {names_of(run)}", text, CRITERION, max(shares) <= SHARE
    )  # fmt: skip


def against(run: Run, method: str) -> Result:
    """Compare a method with KDS."""
    ratios = [mean_error(run, method, *of) / mean_error(run, GAUSSIAN, *of) for of in settings(run)]
    text = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    return Result(f"{method}: error over that of {GAUSSIAN}", text, "criterion: at most 1", max(ratios) <= 1)


def of_centers(run: Run, method: str) -> Result:
    """List the effective number of centers of the density estimate."""
    found = [run.by_seed("fit", "centers", setting=kind, d=d, method=method) for kind, d in settings(run)]
    text = " / ".join(spread(values, ".1f") if values else "–" for values in found)
    return Result(f"{method}: effective number of centers, of {run.config.samples}", text)


def of_settings(run: Run) -> list[Result]:
    """List all measures of every setting and method."""
    lines = []
    for kind, d in settings(run):
        for method in (NO_EFFECT, TRUTH, *methods_at(run, d)):
            found = {c: run.by_seed("fit", c, setting=kind, d=d, method=method) for c in COLUMNS}
            text = "; ".join(f"{COLUMNS[c]} {spread(v, '.2f')}" for c, v in found.items() if v)
            lines.append(Result(f"{kind}, d = {d}: {method}", text))
    return lines
