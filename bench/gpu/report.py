"""The README's table of GPU results, from the newest JSON of each card in bench/results."""

import json
import math
from pathlib import Path
from typing import Any

from bench.gpu.cases import COMPILED, KEOPS, OURS, PLAIN
from bench.records import duration
from bench.training import cost, presets

PEERS = (PLAIN, COMPILED, KEOPS)
TOLERANCE, PEERS_TOLERANCE = 1e-4, 1e-2  # relative errors above which no figure is shown
NONE = "No card has run `make gpu` yet: there are no figures."


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last results of each card."""
    by_card = {}
    for file in sorted(folder.glob("*-gpu-*.json")):  # names begin with the date
        results = json.loads(file.read_text())
        by_card[results["machine"]["card"]] = results
    return list(by_card.values())


def peer_cell(row: dict[str, Any] | None, ours: float) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return row["failed"].split(":")[0]
    if wrong(row):
        return "wrong"
    return f"{row['seconds']['median'] / ours:.3g} ×"


def wrong(row: dict[str, Any]) -> bool:
    """Whether the answer is, or nobody knows, so that its time means nothing."""
    return not row.get("error", math.nan) < (TOLERANCE if row["who"] == OURS else PEERS_TOLERANCE)


def errors(rows: dict[str, dict[str, Any]]) -> str:
    found = [rows.get(who, {}).get("error") for who in (OURS, PLAIN, KEOPS)]
    return " / ".join("–" if error is None else f"{error:.0e}" for error in found)


def memory(row: dict[str, Any] | None) -> str:
    return f"{row['memory'] / 1e6:.3g}" if row and "memory" in row and not wrong(row) else "–"


def table(results: dict[str, Any]) -> list[str]:
    machine, tests = results["machine"], results["tests"]
    lines = [
        f"**{machine['card']}**, {machine['date'][:10]}, driver {machine['driver']}, torch {machine['torch']}, Triton "
        f"{machine['triton']}, commit {machine['commit']}; tests: "
        f"{' '.join(tests['summary']) if tests else 'not run'}.",
        "",
        "| what | size | `triton` | pairs/s | limit | plain PyTorch | torch.compile | KeOps | MB: ours / plain "
        "| error: ours / plain / KeOps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys((row["case"]["kind"], row["case"]["name"]) for row in results["rows"])
    for kind, name in names:
        rows = {r["who"]: r for r in results["rows"] if (r["case"]["kind"], r["case"]["name"]) == (kind, name)}
        ours = rows[OURS]
        if "failed" in ours or wrong(ours):
            said = ours["failed"].split(":")[0] if "failed" in ours else "wrong"
            lines.append(f"| {kind} | {name} | {said} |" + " |" * 6 + f" {errors(rows)} |")
            continue
        # Peers take their launches one by one, or in graphs of their own where torch.compile makes them.
        median = ours["graph"]["median"]
        cells = [
            duration(median),
            f"{ours['pairs_a_second']:.1e}",
            f"{ours['limit_seconds'] / median:.0%}",
            *(peer_cell(rows.get(p), median) for p in PEERS),
        ]
        cells += [f"{memory(ours)} / {memory(rows.get(PLAIN))}", errors(rows)]
        lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    if found := results.get("velocity"):
        if "failed" in found:
            said = found["failed"]
        else:
            torch_seconds, triton_seconds = found["steps"]["torch"], found["steps"]["triton"]
            said = (
                f"a fit of 100 passes over 3696 cells and 2000 genes {found['fit']:.1f} s; a step "
                f"{1e3 * triton_seconds:.3g} ms, on the torch backend {torch_seconds / triton_seconds:.1f} × that"
            )
        lines += ["", f"RNA velocity: {said}."]
    if results.get("training"):
        lines += ["", "A training step beside one of score matching:", "", *cost.HEAD.splitlines()]
        for name in dict.fromkeys(row["setting"]["name"] for row in results["training"]):
            lines += cost.table([row for row in results["training"] if row["setting"]["name"] == name])
    if found := results.get("presets"):
        lines += ["", "The paper's trainings, from steps measured:", "", *presets.HEAD.splitlines()]
        lines += [presets.line(row) for row in found]
    return lines


def report(folder: Path) -> str:
    tables = [line for results in newest(folder) for line in [*table(results), ""]]
    return "\n".join(tables).rstrip() or NONE
