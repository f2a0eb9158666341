"""Comparison of the measurements with hypotheses about architectures, which were written before any result was seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.architectures.networks import (
    ARCHITECTURES,
    PATCH_1,
    PATCH_2,
    PATCH_4,
    PATCH_4_CONV,
    UNET,
)
from experiments.architectures.precision import BF16, FLOAT32, NETWORK_METHODS, column
from experiments.architectures.training import OBJECTIVES
from experiments.common.objectives import DSM, FLUX
from experiments.common.results import Result, spread
from experiments.common.run import Run

UNTRAINED = "untrained"
DOUBLE, FORWARD, FINITE = NETWORK_METHODS
FIRST = ("size", "error", "asymmetry", "change", "roughness")
SECOND = ("second", "second_error", "residual", "probe_noise")


def by_seed(run: Run, kind: str, name: str, architecture: str, objective: str) -> list[float]:
    """Return a column of the rows by seed: the mean over noise levels of each seed."""
    found: dict[int, list[float]] = {}
    for row in run.rows(kind):
        if (row["architecture"], row["objective"]) == (architecture, objective):
            found.setdefault(row["seed"], []).append(row[name])
    return [statistics.mean(found[seed]) for seed in sorted(found)]


def means(run: Run, kind: str, name: str, objective: str = FLUX) -> dict[str, float]:
    """Return the mean of a column over seeds and noise levels by architecture."""
    return {a: statistics.mean(by_seed(run, kind, name, a, objective)) for a in ARCHITECTURES}


def results(run: Run) -> list[Result]:
    """List the hypotheses, then the measurements by architecture."""
    return [*of_derivatives(run), *of_quality(run), *of_methods(run), *tables(run)]


def _numbers(values: Mapping[str, float], names: Sequence[str], digits: str = ".3f") -> str:
    return ", ".join(f"{name} {values[name]:{digits}}" for name in names)


def of_derivatives(run: Run) -> list[Result]:
    """Hypotheses about the derivatives of fields of Flux Matching."""
    patches, others = (PATCH_1, PATCH_2, PATCH_4), [name for name in ARCHITECTURES if name != UNET]
    error, residual = means(run, "derivatives", "error"), means(run, "derivatives", "residual")
    change, rough = means(run, "derivatives", "change"), means(run, "derivatives", "roughness")
    seam = means(run, "derivatives", "seam")
    return [
        Result(
            "error of the Jacobian, flux",
            _numbers(error, patches),
            "hypothesis: rising with the patch",
            error[PATCH_1] < error[PATCH_2] < error[PATCH_4],
        ),
        Result(
            "gradient of the residual, flux",
            _numbers(residual, patches),
            "hypothesis: rising with the patch",
            residual[PATCH_1] < residual[PATCH_2] < residual[PATCH_4],
        ),
        Result(
            "roughness of the error, flux",
            _numbers(rough, patches, ".2f"),
            "hypothesis: rising with the patch",
            rough[PATCH_1] < rough[PATCH_2] < rough[PATCH_4],
        ),
        *(
            Result(
                f"{name}, flux",
                f"{_numbers(values, [UNET])}; best transformer {min(values[other] for other in others):.3f}",
                "hypothesis: smallest for the UNet",
                values[UNET] < min(values[other] for other in others),
            )
            for name, values in {
                "error of the Jacobian": error,
                "gradient of the residual": residual,
                "change of the Jacobian under a tiny move": change,
                "roughness of the error": rough,
            }.items()
        ),
        Result(
            "error of the Jacobian across seams over that within patches, flux",
            _numbers(seam, (PATCH_2, PATCH_4, PATCH_4_CONV), ".2f"),
            "hypothesis: above 1.2 for patches, lower with a convolution",
            min(seam[PATCH_2], seam[PATCH_4]) > 1.2 and seam[PATCH_4_CONV] < seam[PATCH_4],
        ),
    ]


def of_quality(run: Run) -> list[Result]:
    """Hypotheses about what Flux Matching loses against score matching with the same network."""
    lines = []
    for kind, name, text in (
        ("model", "pixels", "W2 of the pixels"),
        ("derivatives", "residual", "gradient of the residual"),
    ):
        flux, dsm = means(run, kind, name), means(run, kind, name, DSM)
        ratio = {a: flux[a] / dsm[a] for a in ARCHITECTURES}
        lines.append(
            Result(
                f"{text}, flux over score matching",
                _numbers(ratio, tuple(ARCHITECTURES), ".2f"),
                "hypothesis (D.3): patch 4 above the UNet by a tenth or more",
                ratio[PATCH_4] > 1.1 * ratio[UNET],
            )
        )
    return lines


def of_methods(run: Run) -> list[Result]:
    """Hypotheses about second-derivative methods."""
    rows = [row for row in run.rows("method") if row["objective"] == FLUX]
    worst = {
        (method, precision): max(
            (row[column(method, precision)] for row in rows if row[column(method, precision)] is not None),
            default=math.nan,
        )
        for method in NETWORK_METHODS
        for precision in (FLOAT32, BF16)
    }
    nearer = sum(row[column(DOUBLE, BF16)] < row[column(FINITE, BF16)] for row in rows)
    harmless = max(row[column(FINITE, FLOAT32)] / row["probe"] for row in rows)
    noisy = max(row[column(FINITE, BF16)] / row["probe"] for row in rows)
    return [
        Result(
            "float32: largest error of exact methods",
            f"{max(worst[DOUBLE, FLOAT32], worst[FORWARD, FLOAT32]):.1e}",
            "hypothesis: below 1e-4 in every architecture",
            max(worst[DOUBLE, FLOAT32], worst[FORWARD, FLOAT32]) < 1e-4,
        ),
        Result(
            "float32: largest error of finite differences; over the noise of a probe",
            f"{worst[FINITE, FLOAT32]:.1e}; {harmless:.1e}",
            "hypothesis: below 1e-2; below 0.1",
            worst[FINITE, FLOAT32] < 1e-2 and harmless < 0.1,
        ),
        Result(
            "bfloat16: largest error of double backward, forward over reverse, finite differences",
            ", ".join(f"{worst[method, BF16]:.3f}" for method in NETWORK_METHODS),
        ),
        Result(
            "bfloat16: cases in which double backward is nearer than finite differences",
            f"{nearer} of {len(rows)}",
            "hypothesis: all",
            nearer == len(rows),
        ),
        Result(
            "bfloat16: largest error of finite differences over the noise of a probe",
            f"{noisy:.2f}",
            "hypothesis: above 1 somewhere",
            noisy > 1,
        ),
    ]


def tables(run: Run) -> list[Result]:
    """All measurements by architecture, means over noise levels."""
    lines = []
    for name in ("exact score", "true images"):
        found = [spread(run.by_seed("exact", c, name=name)) for c in ("pixels", "waves")]
        lines.append(Result(f"{name}: W2 of the pixels; of the waves", "; ".join(found)))
    for objective in (*OBJECTIVES, UNTRAINED):
        for architecture in ARCHITECTURES:

            def text(kind: str, names: Sequence[str], a: str = architecture, o: str = objective) -> str:
                return "; ".join(spread(by_seed(run, kind, name, a, o)) for name in names)

            of = f"{architecture}, {objective}"
            lines += [
                Result(f"{of}: excess denoising error", text("derivatives", ("excess",))),
                Result(
                    f"{of}: Jacobian: size; error; asymmetry; change; roughness; seam",
                    text("derivatives", (*FIRST, "seam")),
                ),
                Result(f"{of}: ∇(∇·f): size; error; ∇r; noise of a probe", text("derivatives", SECOND)),
            ]
            if objective != UNTRAINED:
                lines.append(Result(f"{of}: W2 of the pixels; of the waves", text("model", ("pixels", "waves"))))
    return [*lines, *of_precision(run), *of_times(run)]


def of_precision(run: Run) -> list[Result]:
    """Errors of the methods by architecture, means over seeds and noise levels."""
    lines = []
    for architecture in ARCHITECTURES:
        rows = [r for r in run.rows("method") if (r["architecture"], r["objective"]) == (architecture, FLUX)]
        columns = [column(method, precision) for precision in (FLOAT32, BF16) for method in NETWORK_METHODS]
        found = [[row[name] for row in rows if row[name] is not None] for name in columns]
        lines.append(
            Result(
                f"{architecture}: errors: {', '.join(columns)}; noise of a probe",
                ", ".join(_or_fails(statistics.mean(values) if values else None, ".1e") for values in found)
                + f"; {statistics.mean(row['probe'] for row in rows):.3f}",
            )
        )
    return lines


def _or_fails(value: float | None, digits: str) -> str:
    return "fails" if value is None else format(value, digits)


def of_times(run: Run) -> list[Result]:
    """Times by architecture."""
    lines = []
    for row in run.rows("time"):
        lines.append(
            Result(
                f"{row['architecture']}: ms per step, flux / score matching; of the endpoints by method",
                f"{row[FLUX]:.0f} / {row[DSM]:.0f}; "
                + ", ".join(f"{method} {_or_fails(row[method], '.0f')}" for method in NETWORK_METHODS),
            )
        )
    return lines
