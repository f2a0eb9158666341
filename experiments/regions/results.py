"""Comparison of the measurements with the known joint distribution of the parts."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.common.objectives import DSM, FLUX
from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.regions import gaussian
from experiments.regions.images import CORRELATION, DISPLACEMENT
from experiments.regions.training import FULL, MASKED, MODELS

NAMES = {
    (FLUX, MASKED): "flux, masked",
    (FLUX, FULL): "flux, full",
    (DSM, MASKED): "score matching, masked",
    (DSM, FULL): "score matching, full",
}


def by_model(run: Run, column: str) -> dict[tuple[str, str], list[float]]:
    """Return a column of the rows "model" by model and seed."""
    return {key: run.by_seed("model", column, objective=key[0], mask=key[1]) for key in MODELS}


EXACT = {"exact score": FULL, "exact score, masked": MASKED}


def by_name(run: Run, column: str) -> dict[str, list[float]]:
    """Return a column of the rows "exact" and "model" by name and seed."""
    found = {name: run.by_seed("exact", column, mask=mask) for name, mask in EXACT.items()}
    trained = by_model(run, column)
    return found | {name: trained[key] for key, name in NAMES.items()}


def results(run: Run) -> list[Result]:
    """Compare with the closed forms and with the known joint distribution."""
    return [*of_stationary(run), *of_generated(run), *of_drawn(run)]


def of_stationary(run: Run) -> list[Result]:
    """Lines about the laws that linear fields leave in place."""
    lines = []
    for name in gaussian.FIELDS:
        rows: list[dict[str, Any]] = [row for row in run.rows("stationary") if row["field"] == name]
        worst, seen = max(row["w2"] for row in rows), max(row["seen"] for row in rows)
        exact = name != gaussian.DSM
        hidden = name != gaussian.SCORE
        lines.append(
            Result(
                f"Gaussian images, {name}: correlation that the field keeps at σ = "
                f"{', '.join(str(row['sigma']) for row in rows)}; largest W2 to p_σ; largest entry of A above the mask",
                f"{', '.join(format(row['correlation'], '.3f') for row in rows)}; {worst:.1e}; {seen:.1e}",
                f"truth: {', '.join(format(row['truth'], '.3f') for row in rows)}; {'0' if exact else 'above 0'}",
                ((worst < 1e-6) if exact else (worst > 1e-2)) and (seen == 0) == hidden,
            )
        )
    return lines


def of_generated(run: Run) -> list[Result]:
    """Lines about samples of linear fields."""
    lines = []
    for name in gaussian.FIELDS:
        rows = [row for row in run.rows("generated") if row["field"] == name]
        steps = ", ".join(str(row["steps"]) for row in rows)
        lines.append(
            Result(
                f"Gaussian images, {name}: W2 and correlation of samples in {steps} steps",
                ", ".join(f"{row['w2']:.3f}" for row in rows)
                + "; "
                + ", ".join(f"{row['correlation']:.3f}" for row in rows),
                f"truth: 0; {rows[0]['truth']:.3f}",
            )
        )
    return lines


def of_drawn(run: Run) -> list[Result]:
    """Lines about the trained fields."""
    columns = ("correlation", "displacement", "joint", "left", "right", "error", "blank")
    found = {column: by_name(run, column) for column in columns}
    (floor,) = run.rows("floor")
    lines = [
        Result(
            "true images: correlation; displacement; W2 of joint, left, right centers; error of pixels; no disc",
            "; ".join(f"{floor[column]:.3f}" for column in columns),
            f"theory: {CORRELATION:.3f}; {DISPLACEMENT}",
        )
    ]
    lines += [
        Result(
            f"{name}: correlation; displacement; W2 of joint, left, right centers; error of pixels; no disc",
            "; ".join(spread(found[column][name]) for column in columns),
        )
        for name in found["correlation"]
    ]
    seen = by_model(run, "seen")
    lines.append(
        Result(
            "largest entry of ∂f(left)/∂x(right), masked / full",
            " / ".join(f"{max(seen[FLUX, mask] + seen[DSM, mask]):.3g}" for mask in (MASKED, FULL)),
            "0 / above 0",
            max(seen[FLUX, MASKED] + seen[DSM, MASKED]) == 0 < min(seen[FLUX, FULL] + seen[DSM, FULL]),
        )
    )
    correlation = {name: statistics.mean(values) for name, values in found["correlation"].items()}
    masked = [correlation[name] for name in (NAMES[FLUX, MASKED], NAMES[DSM, MASKED], "exact score, masked")]
    kept = {o: correlation[NAMES[o, MASKED]] / correlation[NAMES[o, FULL]] for o in (FLUX, DSM)}
    lines += [
        Result(
            "correlation under the mask: flux / score matching / exact score",
            " / ".join(f"{value:.3f}" for value in masked),
            f"criterion: the first above the second (truth {CORRELATION:.3f})",
            masked[0] > masked[1],
        ),
        Result(
            "correlation under the mask: flux over truth",
            f"{masked[0] / CORRELATION:.2f}",
            "criterion: above 0.9",
            masked[0] / CORRELATION > 0.9,
        ),
        Result(
            "correlation with the mask over that without: flux / score matching",
            f"{kept[FLUX]:.2f} / {kept[DSM]:.2f}",
            "criterion: falling",
            kept[FLUX] > kept[DSM],
        ),
    ]
    return lines
