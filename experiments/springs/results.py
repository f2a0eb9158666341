"""Numbers of the summary and of the figures, read from the logged rows."""

from __future__ import annotations

import statistics

from experiments.common.objectives import DSM, FLUX, stages
from experiments.common.results import Result, spread
from experiments.common.run import Run
from experiments.common.timing import step_results
from experiments.springs import line, linear
from experiments.springs.training import CAUSAL, MASKS, MODELS, OBJECTIVES, SIZED


def relative_changes(run: Run, objective: str, iteration: int, column: str = "w2") -> list[float]:
    """(W2 with the causal mask)/(W2 without) - 1 after that iteration, one value per seed."""
    full, causal = (run.by_seed("model", column, objective=objective, mask=mask, iteration=iteration) for mask in MASKS)
    return quotients(causal, full)


def quotients(masked: list[float], unmasked: list[float]) -> list[float]:
    """masked/unmasked - 1, one value per seed."""
    return [one / other - 1 for one, other in zip(masked, unmasked, strict=True)]


def least(run: Run, objective: str, mask: str, column: str = "w2") -> list[float]:
    """Least W2 over the evaluations, one value per seed: that of the checkpoint that the published program keeps."""
    found = [
        run.by_seed("model", column, objective=objective, mask=mask, iteration=stage) for stage in stages(run.config)
    ]
    return [min(values) for values in zip(*found, strict=True)]


def linear_curves(run: Run) -> tuple[dict[str, dict[float, float]], dict[str, dict[float, float]]]:
    """Return (W2 by number of steps, size by σ) of every linear field."""
    return linear_curve(run, "linear", "steps", "w2"), linear_curve(run, "linear size", "sigma", "size")


def linear_curve(run: Run, kind: str, x: str, y: str) -> dict[str, dict[float, float]]:
    """Column `y` by column `x` in the rows of one kind, for every linear field."""
    return {name: {row[x]: row[y] for row in run.rows(kind) if row["field"] == name} for name in linear.FIELDS}


def trained_sizes(run: Run) -> dict[str, dict[float, float]]:
    """Mean size over seeds of the trained fields with the mask, by σ."""
    return {
        objective: {
            sigma: statistics.mean(run.by_seed("field size", "size", objective=objective, mask=CAUSAL, sigma=sigma))
            for sigma in SIZED
        }
        for objective in OBJECTIVES
    }


def results(run: Run, changes: dict[str, dict[int, list[float]]]) -> list[Result]:
    """Lines of the summary; `changes` are the relative changes of W2 by objective and stage."""
    return [
        *distances(run),
        *mask_changes(run, changes),
        *other_changes(run),
        *linear_fields(run),
        *line_results(run),
        *step_results(run, DSM),
    ]


def distances(run: Run) -> list[Result]:
    """W2 of each model, of new trajectories and of repeated ones, to the training and to fresh trajectories."""
    last = run.config.iterations
    lines = []
    for objective, mask in MODELS:
        known = {"objective": objective, "mask": mask, "iteration": last}
        found = [run.by_seed("model", column, **known) for column in ("w2", "w2_fresh")]
        found.append(least(run, objective, mask))
        lines.append(
            Result(
                f"W2 to training / fresh trajectories; to training ones, least evaluation: {objective}, {mask}",
                "{} / {}; {}".format(*(spread(values, ".4g") for values in found)),
            )
        )
    (row,) = run.rows("floor")
    names = {"w2": "new trajectories of the simulator", "repeated": "training trajectories, repeated at random"}
    lines += [
        Result(f"W2 to training / fresh trajectories: {text}", f"{row[name]:.4g} / {row[f'{name}_fresh']:.4g}")
        for name, text in names.items()
    ]
    return lines


def other_changes(run: Run) -> list[Result]:
    """The mask's effect by W2 to fresh trajectories, by the best checkpoints, and with the label of the training."""
    last, lines = run.config.iterations, []
    for objective in OBJECTIVES:
        changes = {
            "to fresh trajectories": relative_changes(run, objective, last, "w2_fresh"),
            "of the least evaluation": quotients(*(least(run, objective, mask) for mask in MASKS[::-1])),
        }
        own = relative_changes(run, objective, last, "w2_own_label")
        if own:
            changes["sampled with the label of its training"] = own
        lines += [
            Result(f"change of W2 by the mask, {name}: {objective}", spread(found, "+.1%"))
            for name, found in changes.items()
        ]
    return lines


def line_results(run: Run) -> list[Result]:
    """Least loss of a minibatch, and zero of its gradient, on the line of linear fields."""
    lines = []
    for row in run.rows("line"):
        centers = f"{line.BATCH} centers" + (f" + {row['refs']}" if row["refs"] else "")
        values = f"{row['minimum']:.2f}; {row['stop']:.2f} ± {row['error']:.2f}; {row['alone']:.2f}"
        lines.append(
            Result(
                f"line from keeping p_σ (0) to masked DSM (1), σ = {row['sigma']:g}, {centers}: least loss; "
                "zero of its gradient; least loss of centers alone; effective centers",
                f"{values}; {row['centers']:.1f}",
            )
        )
    return lines


def mask_changes(run: Run, changes: dict[str, dict[int, list[float]]]) -> list[Result]:
    """Signs of the mask's effect on both objectives, and its difference between them."""
    lines = []
    for objective, by_stage in changes.items():
        value = statistics.mean(by_stage[run.config.iterations])
        wanted, holds = ("at least 0", value >= 0) if objective == DSM else ("below 0", value < 0)
        lines.append(
            Result(
                f"change of W2 by the mask after {', '.join(map(str, by_stage))} iterations: {objective}",
                ", ".join(spread(found, "+.1%") for found in by_stage.values()),
                f"criterion: last mean {wanted} (Fig. 7)",
                holds,
            )
        )
    differences = [
        [100 * (flux - dsm) for flux, dsm in zip(changes[FLUX][stage], changes[DSM][stage], strict=True)]
        for stage in stages(run.config)
    ]
    lines.append(
        Result(
            "the mask's change for Flux Matching minus that for score matching, in percentage points, at these stages",
            ", ".join(spread(found, "+.1f") for found in differences),
            "criterion: all means below 0",
            all(statistics.mean(found) < 0 for found in differences),
        )
    )
    return lines


def linear_fields(run: Run) -> list[Result]:
    """Linear fields in closed form, the size of the trained fields beside them, and the effect of the mask on W2."""
    w2, sizes = linear_curves(run)
    few, many = min(w2[linear.SCORE]), max(w2[linear.SCORE])
    lines = [
        Result(
            f"linear fields, closed form: W2 in {few:.0f} / {many:.0f} steps; size at σ = 0.1: {name}",
            f"{found[few]:.3g} / {found[many]:.3g}; {sizes[name][0.1]:.2f}",
        )
        for name, found in w2.items()
    ]
    lines += [
        Result(
            f"trained fields, {objective}, causal: size at σ = {', '.join(map(str, found))}",
            ", ".join(f"{value:.2f}" for value in found.values()),
        )
        for objective, found in trained_sizes(run).items()
    ]
    flux, dsm = w2[linear.FLUX][many], w2[linear.DSM][many]
    lines.append(
        Result(
            f"linear fields in {many:.0f} steps: W2 under the mask, score matching over Flux Matching",
            f"{dsm / flux:.3g}",
            "criterion: above 1",
            dsm > flux,
        )
    )
    return lines
