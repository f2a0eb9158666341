"""Time, memory and share of the limit against size, from the results of `pytest bench`."""

from pathlib import Path
from typing import Any

from bench.origin import Origin
from bench.speed import LABELS, Row, wrong
from bench.tasks import SCORE
from bench.workloads import SCALING
from experiments.common import figures as style

COLORS = {
    "cpu": style.FLUX,
    "whole": style.SCORE_MATCHING,
    "keops": style.PRESERVING,
    "attention": style.ACCENT,
}


def curves(results: dict[str, Any], what: str) -> dict[str, list[tuple[float, Row]]]:
    """(size, row) along the sizes that grow, by implementation; wrong answers left out."""
    rows = [row for row in results["rows"] if row["table"] == f"{SCORE.name} by {what}"]
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if not wrong(row):
            found.setdefault(row["implementation"], []).append((float(row["name"].split()[-1]), row))
    return found


def draw_quantity(path: Path, results: dict[str, Any], column: str, label: str, factor: float) -> None:
    """Draw one panel per size that grows; a cross at the top where memory ran out."""
    fig, panels = style.new_figure(11.0, 3.1, 1, len(SCALING), sharey=True)
    for axes, what in zip(panels, SCALING, strict=True):
        for name, points in curves(results, what).items():
            good = [(size, factor * row[column]) for size, row in points if row.get(column)]
            if good:
                axes.plot(*zip(*good, strict=True), "o-", ms=3.5, color=COLORS[name], label=LABELS[name].strip("`"))
            for size, row in points:
                if "failed" in row:
                    axes.plot(size, 0.96, "x", ms=7, mew=2, color=COLORS[name], transform=axes.get_xaxis_transform())
        axes.set(xscale="log", yscale="log" if column != "limit" else "linear", xlabel=what)
    panels[0].set_ylabel(label)
    handles, names = panels[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)), fontsize=8, frameon=False)
    origin = Origin.of(results)
    machine = origin.machine
    fig.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {origin.date}, {origin.commit}", fontsize=8)
    style.save(fig, path)


TIME = "speed-time.png"
QUANTITIES = {
    TIME: ("seconds", "time of a score (ms)", 1e3),
    "speed-memory.png": ("memory", "memory of a call (MB)", 1e-6),
    "speed-limit.png": ("limit", "share of the machine's limit (%)", 100.0),
}


def draw(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Draw all plots into that folder."""
    paths = [folder / name for name in QUANTITIES]
    for path, (column, label, factor) in zip(paths, QUANTITIES.values(), strict=True):
        draw_quantity(path, results, column, label, factor)
    return paths
