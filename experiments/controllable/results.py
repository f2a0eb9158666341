"""Comparison with the paper, from the logged rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from experiments.common.results import Result, spread
from experiments.controllable.bins import bin_means

Row = dict[str, Any]
VIOLATIONS = {"violation": "exact divergence", "grid_violation": "central differences, as in the published program"}


def column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """Return one column of rows as an array."""
    return np.array([row[name] for row in rows], dtype=np.float64)


def rises(rows: Sequence[Row], violation: str, loss: str, bins: int) -> bool:
    """Return whether a loss rises from bin to bin of V, within standard errors; the exact loss of a field has none."""
    error = column(rows, "flux_loss_error") if loss == "flux_loss" else np.zeros(len(rows))
    return bin_means(column(rows, violation), column(rows, loss), error, bins).rising


def results(fields: Sequence[Row], seeds: Sequence[Sequence[Row]], bins: int) -> list[Result]:
    """Compare with the paper.

    Args:
        fields: rows of both families, of seed 0.
        seeds: rows of the violating family, by seed.
        bins: bins of Figure 4.
    """
    violating = [row for row in fields if row["family"] == "violating"]
    preserving = [row for row in fields if row["family"] == "preserving"]
    flux, flux_error = column(violating, "flux_loss"), column(violating, "flux_loss_error")
    exact = column(violating, "exact_loss")
    leak = np.abs(column(preserving, "flux_loss")).max() / flux.mean()
    blind = column(preserving, "score_matching_loss").mean() / column(violating, "score_matching_loss").mean()
    agreement = flux.mean() / exact.mean()
    agreement_error = np.sqrt((flux_error**2).sum()) / len(flux) / exact.mean()
    return [
        Result(
            "largest flux loss of a preserving field / mean of the violating fields",
            f"{leak:.1e}",
            "exactly zero",
            bool(leak < 1e-3),
        ),
        *violation_results(seeds, bins),
        Result(
            "mean V of the preserving fields / of the violating ones, by these two ways",
            ", ".join(f"{column(preserving, name).mean() / column(violating, name).mean():.2g}" for name in VIOLATIONS),
            "0",
        ),
        Result("rank correlation of flux loss and its exact value", f"{spearmanr(exact, flux)[0]:.2f}"),
        Result(
            "mean flux loss / mean exact value, violating fields",
            f"{agreement:.2f} ± {agreement_error:.2f}",
            "1 (theory)",
        ),
        Result(
            "score-matching loss, mean of preserving / mean of violating fields",
            f"{blind:.3f}",
            "blind: no difference",
            bool(abs(blind - 1) < 0.05),
        ),
    ]


def violation_results(seeds: Sequence[Sequence[Row]], bins: int) -> list[Result]:
    """Dependence of the losses on V over the seeds, for both ways to take its divergence."""
    lines = []
    for violation, name in VIOLATIONS.items():
        for loss, text in (("flux_loss", "flux loss rises from bin to bin of V, within standard errors"),
                           ("exact_loss", "the exact loss rises from bin to bin of V")):  # fmt: skip
            count = sum(rises(rows, violation, loss, bins) for rows in seeds)
            lines.append(
                Result(
                    f"{text}; V by {name}",
                    f"in {count} of {len(seeds)} seeds",
                    "rises; criterion: in more than half",
                    2 * count > len(seeds),
                )
            )
        falls = [largest_fall(rows, violation, bins) for rows in seeds]
        ranks = [spearmanr(column(rows, violation), column(rows, "exact_loss"))[0] for rows in seeds]
        lines.append(
            Result(
                f"largest fall of the exact loss from a bin to the next; its rank correlation with V; V by {name}",
                f"{spread(falls, '.0%')}; {spread(ranks, '.2f')}",
            )
        )
    return lines


def largest_fall(rows: Sequence[Row], violation: str, bins: int) -> float:
    """Return the largest relative fall of the exact loss from a bin of V to the next, 0 if it rises throughout."""
    means = bin_means(column(rows, violation), column(rows, "exact_loss"), np.zeros(len(rows)), bins).mean
    return float(max(0.0, max(1 - means[1:] / np.maximum(means[:-1], 1e-12 * means.max()))))
