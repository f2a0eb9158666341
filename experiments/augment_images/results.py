"""Lines of the summary, read from the logged rows."""

from __future__ import annotations

import math
import statistics

from experiments.augment.chains import CONSTANT
from experiments.augment.results import evaluations
from experiments.augment_images.measure import DRAWS, FIELDS, OF_DIFFUSERS, REFERENCE_STEP, SAMPLERS, TRUTH, place
from experiments.augment_images.training import EXACT, LEARNED, PIPELINE
from experiments.common.results import Result, spread
from experiments.common.run import Run

# Energy distance that v may add to the pipeline's by the same sampler: about that of a share of 0.05 in a wrong place.
MARGIN = 0.15


def results(run: Run) -> list[Result]:
    """All lines of the summary."""
    return [*samples(run), *times(run), *costs(run)]


def samples(run: Run) -> list[Result]:
    """Lines about samples from noise: evaluations, errors of the shares, energy distance and width."""
    cases = [(DRAWS, TRUTH), (OF_DIFFUSERS, PIPELINE), *((name, field) for name in SAMPLERS for field in FIELDS)]
    return [sample(run, name, field) for name, field in cases]


def sample(run: Run, name: str, field: str) -> Result:
    """Line about a sampler and a field; with v the criterion is the distance of the pipeline alone."""
    known = {"sampler": name, "field": field}
    counts, shares, energies, widths = (
        run.by_seed("sample", column, **known) for column in ("evaluations", "shares", "energy", "width")
    )
    shown = f"{spread(shares)}; {spread(energies)}; {spread(widths)}; {statistics.mean(counts):.0f} evaluations"
    label = f"{name}, {field}: error of shares; energy distance; width"
    if field not in (EXACT, LEARNED):
        return Result(label, shown)
    before = run.by_seed("sample", "energy", sampler=name, field=PIPELINE)
    holds = statistics.mean(energies) <= statistics.mean(before) + MARGIN
    return Result(label, shown, f"criterion: energy distance at most {MARGIN:g} above the pipeline's", holds)


def times(run: Run) -> list[Result]:
    """Lines about autocorrelation times with constant small steps."""
    return [
        Result(
            f"{place(sigma)}, {field}: autocorrelation time in units of the variance of a component; bias",
            f"{_shown([REFERENCE_STEP * value for value in reference(run, sigma, field, 'evaluations')])}; "
            f"{_shown(reference(run, sigma, field, 'bias'), '.3f')}",
        )
        for sigma in run.config.sigmas
        for field in FIELDS
    ]


def reference(run: Run, sigma: float, field: str, column: str) -> list[float]:
    """Return a column of the rows with the reference step, by seed; infinite where chains were too short."""
    known = {"problem": place(sigma), "field": field, "schedule": CONSTANT, "sizes": f"{REFERENCE_STEP:.3g}"}
    rows = {row["seed"]: row[column] for row in run.rows("cost") if known.items() <= row.items()}
    return [rows.get(seed, math.inf) for seed in range(run.config.seeds)]


def costs(run: Run) -> list[Result]:
    """Lines about evaluations per independent draw at both biases, with constant steps and the best of all."""
    lines = []
    for sigma in run.config.sigmas:
        for bias in (run.config.bias, run.config.bias / 2):
            for field in FIELDS:
                label = f"{place(sigma)}, {field}, bias {bias:g}"
                best = [evaluations(run, place(sigma), field, bias, kind) for kind in (CONSTANT, None)]
                shown = f"constant {_shown(best[0])}, best of all {_shown(best[1])}"
                lines.append(Result(f"{label}: evaluations per draw", shown))
                if field in (EXACT, LEARNED):
                    before = evaluations(run, place(sigma), PIPELINE, bias)
                    lines.append(gain(f"{label}: times fewer, best of all", before, best[1]))
    return lines


def gain(label: str, before: list[float], after: list[float]) -> Result:
    """Line about how many times fewer evaluations are needed."""
    if not all(map(math.isfinite, (*before, *after))):
        return Result(label, "not measured")
    gains = [a / b for a, b in zip(before, after, strict=True)]
    return Result(label, spread(gains, ".2f"), "criterion: above 1 in all seeds", min(gains) > 1)


def _shown(values: list[float], digits: str = ".1f") -> str:
    return spread(values, digits) if all(map(math.isfinite, values)) else "–"
