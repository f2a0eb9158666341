"""Numbers of the summary and of the figures, read from the logged rows."""

from __future__ import annotations

from experiments.common.results import Result
from experiments.common.run import Run
from experiments.flow_images.measure import pairing
from experiments.flow_images.training import NAMES
from experiments.flows.measure import EULER, SOLVERS
from experiments.flows.training import INDEPENDENT
from experiments.images.stages import floor


def distances(run: Run, name: str, solver: str) -> dict[int, float]:
    """Return the Fréchet distance by number of evaluations."""
    rows = [row for row in run.rows("distance") if (row["variant"], row["solver"]) == (name, solver)]
    return {row["evaluations"]: row["distance"] for row in sorted(rows, key=lambda row: row["evaluations"])}


def trajectories(run: Run, name: str) -> dict[str, float]:
    """Return bend, length and their ratio."""
    (row,) = [row for row in run.rows("trajectories") if row["variant"] == name]
    return row


def results(run: Run) -> list[Result]:
    """Return the claims, and all numbers."""
    lines = [line for name in NAMES if name != INDEPENDENT for line in compare(run, name)]
    real = floor(run, run.config.samples)
    lines += [
        Result(
            f"Fréchet distance on random convolutions, {real['samples']} images: held-out / noise with their moments",
            f"{real['distance']:.3f} / {real['noise']:.2f}",
        ),
        Result(
            f"|x1 - x0|² of pairs in minibatches of {run.config.batch}, exact OT / independent", f"{pairing(run):.3f}"
        ),
    ]
    for name in NAMES:
        for solver in SOLVERS:
            found = distances(run, name, solver)
            counts = ", ".join(map(str, found))
            values = ", ".join(f"{value:.3f}" for value in found.values())
            lines.append(Result(f"{name}: that distance in {counts} evaluations ({solver})", values))
        row = trajectories(run, name)
        lines.append(Result(f"{name}: bend / length; length", f"{row['ratio']:.4f}; {row['length']:.1f}"))
    return lines


def compare(run: Run, name: str) -> list[Result]:
    """Return the two claims about a flow beside the one with independent pairs."""
    ratios = [trajectories(run, variant)["ratio"] for variant in (name, INDEPENDENT)]
    pairs = [[distances(run, variant, EULER)[count] for variant in (name, INDEPENDENT)] for count in (1, 2)]
    return [
        Result(
            f"bend / length, {name} / {INDEPENDENT}",
            " / ".join(f"{ratio:.4f}" for ratio in ratios),
            "criterion: smaller",
            ratios[0] < ratios[1],
        ),
        Result(
            f"Fréchet distance in 1; 2 evaluations (Euler), {name} / {INDEPENDENT}",
            "; ".join(f"{ours:.3f} / {theirs:.3f}" for ours, theirs in pairs),
            "criterion: smaller in both",
            all(ours < theirs for ours, theirs in pairs),
        ),
    ]
