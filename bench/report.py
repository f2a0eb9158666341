"""The tables of a benchmark run, in Markdown.

python -m bench.report results.json     prints them and puts them into bench/results, in place of the last ones
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.limits import model_seconds
from bench.peers import tolerance

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "cpu": "cpu",
    "torch": "torch",
    "published": "plain torch",
    "keops": "KeOps",
    "sklearn": "scikit-learn",
}
NOTES = """\
- *cpu* and *torch* are our backends; both compute in float64 and round once. *Plain torch* is the paper's formulas in
  float32 PyTorch with `torch.randn` noise (`bench/peers.py`); it takes at most 4096 queries of a group at once, because
  at 32768 points the matrices would be 13 GB. In parentheses: the time over that of *cpu*.
- *KeOps* is compiled for this processor (`-march=native -ffast-math`). *scikit-learn* is `KernelDensity` with its
  default tolerances, which are zero. It computes in float64, without threads; beside it *cpu* and *torch* take and
  return float64.
- *Error*: relative, in the Euclidean norm, against the `torch` backend in float64 on the same inputs and noise, on the
  first 4 groups and 512 queries. A time whose answer is wrong is not printed.
- *Limit*: the time that the exponentials and multiply-adds of all pairs need at the best rates measured beside the
  cases (`bench/limits.py`), over that of *cpu*. Where *cpu* skips pairs that cannot matter it can exceed 100 %. *Live*:
  the share of pairs whose weight is above rounding.
- *Memory*: growth of the resident set over one call, results included, in a process of its own; empty: not measured.
"""


def quantity(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


class Run:
    """One benchmark of the JSON: what it is of, and what came out."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.info = entry["extra_info"]
        self.who = self.info.get("who") or entry["params"]["who"]
        self.table, _, self.row = entry["group"].partition(": ")
        self.median = entry["stats"]["median"]
        self.error: float | None = self.info.get("error")

    @property
    def wrong(self) -> bool:
        # Not "error >= tolerance": a NaN is wrong as well.
        return self.error is not None and not self.error < tolerance(self.who)


def time_cell(run: Run | None, base: Run | None) -> str:
    if run is None:
        return "–"
    if run.wrong:
        return "wrong"
    if base is None or base.wrong or run is base:
        return quantity(run.median)
    return f"{quantity(run.median)} ({run.median / base.median:.3g} ×)"


def limit_cells(run: Run | None, rates: tuple[float, float]) -> list[str]:
    if run is None or run.wrong:
        return ["–", "–"]
    case = Case(*run.info["case"])
    return [f"{model_seconds(run.info['op'], case, rates) / run.median:.0%}", f"{run.info['live_share']:.0%}"]


def memory_cell(run: Run | None) -> str:
    return f"{run.info['memory'] / 1e6:.0f} MB" if run and "memory" in run.info else ""


def table(runs: list[Run], rates: tuple[float, float]) -> list[str]:
    """Markdown of the runs of one operation: a row a case, a column for each who runs it."""
    names = [who for who in LABELS if any(run.who == who for run in runs)]
    names += sorted({run.who for run in runs} - set(names))
    measured = [who for who in names if any("memory" in run.info for run in runs if run.who == who)]
    checked = any(run.error is not None for run in runs)

    heads = ["case", *(LABELS.get(who, who) for who in names)]
    if checked:
        heads += ["limit", "live", "error: " + " / ".join(LABELS.get(who, who) for who in names)]
    heads += [f"memory: {LABELS.get(who, who)}" for who in measured]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in dict.fromkeys(run.row for run in runs):
        by_who = {run.who: run for run in runs if run.row == row}
        cells = [row, *(time_cell(by_who.get(who), by_who.get("cpu")) for who in names)]
        if checked:
            found = [by_who[who].error if who in by_who else None for who in names]
            cells += limit_cells(by_who.get("cpu"), rates)
            cells += [" / ".join("–" if error is None else f"{error:.0e}" for error in found)]
        cells += [memory_cell(by_who.get(who)) for who in measured]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def best_rates(runs: list[Run]) -> tuple[float, float]:
    """The highest of those measured beside every case: a machine that others use as well is not always as fast."""
    measured = [run.info["rates"] for run in runs if "rates" in run.info] or [(math.nan, math.nan)]
    return max(e for e, _ in measured), max(m for _, m in measured)


def header(results: dict[str, Any], rates: tuple[float, float]) -> list[str]:
    machine, commit = results["machine_info"], results["commit_info"]
    ours = machine["fluxkernels"]
    exponentials, multiply_adds = rates
    changed = " with changes" if commit.get("dirty") else ""
    return [
        f"# Speed on a CPU, {results['datetime'][:10]}",
        "",
        f"`make bench`, one run, medians. {machine['cpu'].get('brand_raw', 'Unknown CPU')}, {ours['threads']} "
        f"threads ({ours['thread_source']}), {machine['system']}, Python {machine['python_version']}, torch "
        f"{ours['torch']}, instruction set {ours['target']}, commit {str(commit.get('id'))[:7]}{changed}. In the same "
        f"run, all threads together: {exponentials:.2g} exponentials and {multiply_adds:.2g} multiply-adds a second, "
        "in double precision.",
    ]


def cores(runs: list[Run]) -> str:
    """Who kept how many cores busy in the calls that take long enough to say."""
    ranges = []
    for who, label in LABELS.items():
        busy = [run.info["cores"] for run in runs if run.who == who and "cores" in run.info and run.median > 0.1]
        if busy:
            ranges.append(f"{label} {min(busy):.1f} to {max(busy):.1f}")
    return f"- Cores busy in calls above 100 ms: {', '.join(ranges) or 'none so long'}."


def report(results: dict[str, Any]) -> str:
    """All tables of pytest-benchmark's JSON."""
    runs = [Run(entry) for entry in results["benchmarks"]]
    rates = best_rates(runs)
    lines = [*header(results, rates), "", *NOTES.splitlines(), cores(runs)]
    for name in dict.fromkeys(run.table for run in runs):
        lines += ["", f"## {name}", ""]
        lines += table([run for run in runs if run.table == name], rates)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for <date>-speed-cpu.md")
    options = parser.parse_args()
    results = json.loads(options.json.read_text())
    text = report(results)
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob("*-speed-cpu.md"):
        old.unlink()
    (options.output / f"{results['datetime'][:10]}-speed-cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
