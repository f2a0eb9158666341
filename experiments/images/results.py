"""Lines of the summary, read from the logged rows, beside the paper's numbers."""

from __future__ import annotations

from experiments.common.objectives import DSM, FLUX
from experiments.common.results import Result
from experiments.common.run import Run
from experiments.common.timing import step_results

# Table 1: FID, Inception score, bits per dimension, iterations per second.
PAPER: dict[str, dict[str, tuple[float, float | None, float, float]]] = {
    "cifar10": {FLUX: (9.06, 8.54, 3.26, 4.01), DSM: (4.74, 8.52, 3.16, 11.63)},
    "celeba64": {FLUX: (7.07, None, 2.17, 1.77), DSM: (2.41, None, 2.03, 7.20)},
}


def results(run: Run) -> list[Result]:
    """All lines of the summary."""
    lines = [
        Result(
            f"Fréchet distance on random convolutions, {row['samples']} images: real ones / noise with their moments",
            f"{row['distance']:.3f} / {row['noise']:.2f}",
        )
        for row in run.rows("floor")
    ]
    paper = PAPER.get(run.config.dataset, {})
    for row in run.rows("final"):
        lines += distances(run, row["objective"], row["distance"])
        fid, inception_score, bits, _ = paper.get(row["objective"], (None,) * 4)
        for column, name, published in (
            ("fid", "FID", fid),
            ("inception_score", "Inception score", inception_score),
            ("bits", "bits per dimension", bits),
        ):
            if column in row:
                text = "–" if published is None else f"{published}"
                lines.append(Result(f"{row['objective']}: {name}", f"{row[column]:.3f}", text))
    return lines + step_results(run, DSM, {objective: published_step(paper, objective) for objective in paper})


def distances(run: Run, objective: str, best: float) -> list[Result]:
    """Fréchet distance on random convolutions during training, and that of the best model."""
    stages = [row["distance"] for row in run.rows("progress") if row["objective"] == objective]
    return [
        Result(
            f"{objective}: that distance during training, first / last evaluation",
            f"{stages[0]:.3f} / {stages[-1]:.3f}",
            "criterion: falls",
            stages[-1] < stages[0] if len(stages) > 1 else None,
        ),
        Result(f"{objective}: that distance, best model", f"{best:.3f}"),
    ]


def published_step(paper: dict[str, tuple[float, float | None, float, float]], objective: str) -> str:
    """The paper's time of a training step, and its ratio to that of score matching."""
    per_second, baseline = paper[objective][3], paper[DSM][3]
    return f"{1e3 / per_second:.0f} ms ({baseline / per_second:.2f} × DSM), batch 32"
