"""The page's table of GPU results, from the newest JSON of each card in bench/results.

A check that was cut short leaves a file without some results, or with rows that have no time: those cells stay empty.
"""

import json
import math
from pathlib import Path
from typing import Any

from bench import recipes
from bench.gpu.runs import COMPILED, KEOPS, OURS, PLAIN
from bench.origin import Origin
from bench.records import duration
from bench.training import cost, presets

BASELINES = (PLAIN, COMPILED, KEOPS)
TOLERANCE, BASELINES_TOLERANCE = 1e-4, 1e-2  # relative errors above which no figure is shown
NONE = "No card has run `make gpu` yet: there are no figures."


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last results of each card."""
    by_card = {}
    for file in sorted(folder.glob("*-gpu-*.json")):  # names begin with the date
        try:
            results = json.loads(file.read_text())
            by_card[Origin.of(results).machine["card"]] = results
        except (ValueError, KeyError, TypeError):  # not a file of a check
            continue
    return list(by_card.values())


def baseline_cell(row: dict[str, Any] | None, ours: float) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return str(row["failed"]).split(":")[0]
    if wrong(row):
        return "wrong"
    return f"{row['seconds']['median'] / ours:.3g} ×"


def wrong(row: dict[str, Any]) -> bool:
    """True if the answer is wrong or was not judged: then its time means nothing."""
    return not row.get("error", math.nan) < (TOLERANCE if row["implementation"] == OURS else BASELINES_TOLERANCE)


def errors(rows: dict[str, dict[str, Any]]) -> str:
    found = [rows.get(name, {}).get("error") for name in (OURS, PLAIN, KEOPS)]
    return " / ".join("–" if error is None else f"{error:.0e}" for error in found)


def memory(row: dict[str, Any] | None) -> str:
    return f"{row['memory'] / 1e6:.3g}" if row and "memory" in row and not wrong(row) else "–"


def table(results: dict[str, Any]) -> list[str]:
    """Markdown of one card's results."""
    origin, tests = Origin.of(results), results.get("tests")
    lines = [
        f"**{origin.machine['card']}**, {origin.date}: {origin.sentence().rstrip('.')}; tests: "
        f"{' '.join(tests['summary']) or 'no summary' if tests else 'not run'}.",
        "",
        "| task | size | `triton` | in a CUDA graph | pairs/s | limit | plain PyTorch | torch.compile | KeOps "
        "| MB: ours / plain | error: ours / plain / KeOps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = results.get("rows") or []
    runs = dict.fromkeys((row["run"]["kind"], row["run"]["name"]) for row in measured)
    for kind, name in runs:
        rows = [r for r in measured if (r["run"]["kind"], r["run"]["name"]) == (kind, name)]
        row = (f" {cell} |" if cell else " |" for cell in cells({r["implementation"]: r for r in rows}))
        lines.append(f"| {kind} | {name} |{''.join(row)}")
    if results.get("velocity"):
        lines += ["", f"RNA velocity: {velocity(results['velocity'])}."]
    if found := results.get("recipes"):
        lines += ["", "Recipes beside dense implementations:", "", *recipes.HEAD.splitlines()]
        lines += [recipes.line(row) for row in found]
    if results.get("training"):
        lines += ["", "A training step beside one of score matching:", "", *cost.HEAD.splitlines()]
        for name in dict.fromkeys(row["setting"]["name"] for row in results["training"]):
            lines += cost.table([row for row in results["training"] if row["setting"]["name"] == name])
    if found := results.get("presets"):
        lines += ["", "The paper's trainings, from steps measured:", "", *presets.HEAD.splitlines()]
        lines += [presets.line(row) for row in found]
    return lines + unfinished(results)


def unfinished(results: dict[str, Any]) -> list[str]:
    """A sentence about what is missing, if anything is."""
    crashes, left_out = results.get("crashes") or [], results.get("left_out") or []
    parts = [f"{crash['step']}: {crash['reason']}" for crash in crashes]
    parts += [f"{step}: {problem.split(':')[0]}" for step, problem in (results.get("failed") or {}).items()]
    parts += [f"left out for lack of time: {', '.join(left_out)}"] if left_out else []
    parts += ["interrupted"] if results.get("interrupted") else []
    return ["", f"Not measured: {'; '.join(parts)}."] if parts else []


def cells(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Cells of one run, from its rows by implementation."""
    ours = rows.get(OURS, {"failed": "–"})
    if "failed" in ours or wrong(ours):
        return [str(ours["failed"]).split(":")[0] if "failed" in ours else "wrong", *[""] * 7, errors(rows)]
    # Launches one by one beside those of baselines, and a graph beside a graph of torch.compile.
    eager, median = ours["seconds"]["median"], ours["graph"]["median"]
    compiled = median if rows.get(COMPILED, {}).get("mode") == "reduce-overhead" else eager
    return [
        duration(eager),
        duration(median),
        f"{ours['pairs_per_second']:.1e}",
        f"{ours['limit_seconds'] / median:.0%}" if ours.get("limit_seconds") else "–",
        *(baseline_cell(rows.get(name), compiled if name == COMPILED else eager) for name in BASELINES),
        f"{memory(ours)} / {memory(rows.get(PLAIN))}",
        errors(rows),
    ]


def velocity(found: dict[str, Any]) -> str:
    """Times of a fit and a step of `flux_velocity` in words."""
    if "failed" in found:
        return str(found["failed"])
    if "steps" not in found:
        return "not measured"
    torch_seconds, triton_seconds = found["steps"]["torch"], found["steps"]["triton"]
    fit = f"{found['fit']:.1f} s" if "fit" in found else "not measured"
    return (
        f"a fit of 100 epochs over 3696 cells and 2000 genes {fit}; a step "
        f"{1e3 * triton_seconds:.3g} ms, on the torch backend {torch_seconds / triton_seconds:.1f} × that"
    )


def report(folder: Path) -> str:
    tables = [line for results in newest(folder) for line in [*table(results), ""]]
    return "\n".join(tables).rstrip() or NONE
