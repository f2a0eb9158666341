"""Fields that leave p_σ in place exactly, in the box of the plane: what finite steps make of them."""

from __future__ import annotations

from experiments.common.run import Run
from experiments.constrained.domains import PROBLEMS
from experiments.constrained.measure import PLAIN, Ruler, boundary_flow, starts, walk
from experiments.constrained.smoothed_box import SmoothedBox
from experiments.constrained.training import Field

PROBLEM = "box"
EXACT_SCORE, TANGENTIAL, OUTWARD = "exact score", "exact tangential field", "exact outward field"
EXACT_FIELDS = (EXACT_SCORE, TANGENTIAL, OUTWARD)


def study(run: Run) -> None:
    """Log missing rows "exact field": invalid points and distances by step size, and the flow through the faces."""
    problem = PROBLEMS[PROBLEM]
    density = SmoothedBox(problem.sigma)
    fields: dict[str, Field] = dict(
        zip(EXACT_FIELDS, (density.score, density.tangential, density.outward), strict=True)
    )
    done = {(row["field"], row["seed"], row["step"]) for row in run.rows("exact field")}
    for name, field in fields.items():
        for seed in range(run.config.seeds):
            for step in run.config.step_sizes:
                if (name, seed, step) in done:
                    continue
                x, invalid = walk(run, problem, field, starts(run, PROBLEM, seed), step, PLAIN)
                found = Ruler(run, PROBLEM).of_all_and_valid(x) | {"invalid": invalid}
                flow = boundary_flow(run, PROBLEM, field)
                run.log(kind="exact field", field=name, seed=seed, step=step, **found, **flow)
