"""The results of `pytest bench`: kept as dated JSON, shown as Markdown tables.

No time stands in a table whose answer is wrong.
"""

from typing import Any

import torch

from bench.baselines import tolerance
from bench.bench_loss import LOSS
from bench.bench_loss import TOLERANCE as LOSS_TOLERANCE
from bench.limits import model_seconds
from bench.origin import Origin
from bench.records import duration
from bench.tasks import LOG_DENSITY, PASS, SCORE, TASKS
from bench.workloads import Workload

Row = dict[str, Any]
LABELS = {
    "cpu": "`cpu`",
    "torch": "`torch`",
    "published": "plain PyTorch",
    "whole": "plain PyTorch, whole",
    "compiled": "torch.compile",
    "keops": "KeOps",
    "attention": "attention",
    "sklearn": "scikit-learn",
}
NOTES = """\
- `cpu` and `torch` are our backends: `cpu` computes float32 input in float32 with checked errors, `torch` in float64.
  *Plain PyTorch* is the paper's formulas with `torch.randn` noise (`tests/support/published.py`), in float32 unless
  said otherwise, of at most 4096 queries of a group at once; *whole*: of all at once. *torch.compile* compiles them,
  *attention* is scaled_dot_product_attention
  with keys and values = reference points, *KeOps* is compiled for this processor (`-march=native -ffast-math`),
  *scikit-learn* is `KernelDensity` with its default tolerances, which are zero. In parentheses: the time over that of
  `cpu`.
- *Error*: relative, in the Euclidean norm, against the `torch` backend in float64 on the same inputs and noise, on the
  first 4 groups and 512 queries; of the loss: its gradient against float64 with exact derivatives. A time whose answer
  is wrong is not printed: above 1e-5 for our ops (gradients of the pass 1e-4), 1e-2 for the baselines, half precision
  and the loss. `controllable` has no error here: implementations that draw other numbers are compared by means, in
  `tests/bench/test_bench.py`.
- *Limit*: the time that the exponentials and multiply-adds of all pairs need at the best rates
  measured beside them (`bench/limits.py`), over the time taken. Above 100 % are those that skip pairs that cannot
  matter. The loss has none: its network is PyTorch's. *Live*: the share of pairs whose
  weight is above rounding.
- *Memory*: growth of the resident set over one call, results included, in a process of its own that may have 12 GiB;
  empty: not measured.
"""


def arithmetic(dtype: str) -> str:
    """Return the type that numbers of a type are computed in."""
    return "float64" if dtype == "float64" else "float32"


def keep(raw: dict[str, Any]) -> dict[str, Any]:
    """All rows of pytest-benchmark's JSON, without the single times, and with the share of the limit in each row."""
    entries = raw["benchmarks"]
    measured = [entry["extra_info"] for entry in entries if "rates" in entry["extra_info"]]
    by_threads = max((e["extra_info"].get("threads", 1) for e in entries), default=1)
    # The highest: a machine that others use as well is not always as fast.
    rates = {
        kind: [max(info["rates"][k] for info in measured if arithmetic(info["dtype"]) == kind) for k in range(2)]
        for kind in sorted({arithmetic(info["dtype"]) for info in measured})
    }
    rows = []
    for entry in entries:
        info: Row = {name: value for name, value in entry["extra_info"].items() if name != "rates"}
        table, _, name = entry["group"].partition(": ")
        implementation = info.get("implementation") or entry["params"]["implementation"]
        row: Row = {"table": table, "name": name, "implementation": implementation, **info}
        if "failed" not in row:
            row["seconds"] = entry["stats"]["median"]
            if row.get("task") in TASKS:
                share = [rate * row["threads"] / by_threads for rate in rates[arithmetic(row["dtype"])]]
                limit = model_seconds(TASKS[row["task"]], Workload(**row["workload"]), (share[0], share[1]))
                row["limit"] = limit / row["seconds"]
        rows.append(row)
    return {**Origin.of(raw["machine_info"]["origin"]).fields(), "rates": rates, "rows": rows}


def wrong(row: Row) -> bool:
    if row.get("error") is None:
        return False
    if row["task"] == LOSS:
        limit = LOSS_TOLERANCE
    else:
        limit = tolerance(TASKS[row["task"]], row["implementation"], getattr(torch, row["dtype"]))
    return not row["error"] < limit  # a NaN is wrong as well


def size(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def time_cell(row: Row | None, base: Row | None, *, ratio_alone: bool = False) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return row["failed"].split(":")[0]
    if wrong(row):
        return "wrong"
    if base is None or "failed" in base or wrong(base) or row is base:
        return duration(row["seconds"])
    ratio = f"{row['seconds'] / base['seconds']:.3g} ×"
    return ratio if ratio_alone else f"{duration(row['seconds'])} ({ratio})"


def memory_cell(row: Row | None) -> str:
    if row is None or ("memory" not in row and "failed" not in row) or wrong(row):
        return ""
    return size(row["memory"]) if "memory" in row else "> 12 GiB"


def share(row: Row | None, name: str) -> str:
    return f"{row[name]:.0%}" if row and name in row and not wrong(row) else "–"


def table(rows: list[Row]) -> list[str]:
    """Markdown of the rows of one table: a line per workload, a column per implementation."""
    names = [name for name in LABELS if any(row["implementation"] == name for row in rows)]
    measured = [name for name in names if any("memory" in row for row in rows if row["implementation"] == name)]
    checked = any("error" in row for row in rows)
    heads = ["case", *(LABELS[name] for name in names)]
    if checked:
        order = " / ".join(LABELS[name] for name in names)
        heads += [f"limit: {order}", "live", f"error: {order}"]
    heads += [f"memory: {LABELS[name]}" for name in measured]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in dict.fromkeys(row["name"] for row in rows):
        by_name = {row["implementation"]: row for row in rows if row["name"] == case}
        ours = by_name.get("cpu")
        cells = [case, *(time_cell(by_name.get(name), ours) for name in names)]
        if checked:
            found = [by_name.get(name, {}).get("error") for name in names]
            cells += [" / ".join(share(by_name.get(name), "limit") for name in names), share(ours, "live_share")]
            cells += [" / ".join("–" if error is None else f"{error:.0e}" for error in found)]
        cells += [memory_cell(by_name.get(name)) for name in measured]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cores(rows: list[Row]) -> str:
    """Cores that each implementation kept busy, in the calls that take long enough to measure it."""
    ranges = []
    for name, label in LABELS.items():
        busy = [r["cores"] for r in rows if r["implementation"] == name and "cores" in r and r.get("seconds", 0) > 0.1]
        if busy:
            ranges.append(f"{label} {min(busy):.1f} to {max(busy):.1f}")
    return f"- Cores busy in calls above 100 ms: {', '.join(ranges) or 'none so long'}."


def document(results: dict[str, Any]) -> str:
    """Markdown with all tables."""
    rates = "; ".join(
        f"{exponentials:.2g} exponentials and {multiply_adds:.2g} multiply-adds per second in {kind}"
        for kind, (exponentials, multiply_adds) in results["rates"].items()
    )
    rows = results["rows"]
    lines = [
        f"# Speed on a CPU, {results['date']}",
        "",
        f"`make bench`, one run, medians. {Origin.of(results).dated()} In the same run, all threads together: {rates}.",
        "",
        *NOTES.splitlines(),
        cores(rows),
    ]
    lines += ["", *(f"![{what} by size](speed-{what}.png)" for what in ("time", "memory", "limit"))]
    for name in dict.fromkeys(row["table"] for row in rows):
        lines += ["", f"## {name}", "", *table([row for row in rows if row["table"] == name])]
    return "\n".join(lines) + "\n"


# The page's choice by table, with the beginnings of its rows' names: the work of a training step, that which other
# libraries offer too, and the cost of the loss.
SHOWN = {
    PASS.name: ("pass", ("",)),
    SCORE.name: ("score", ("toy", "RNA", "springs", "many", "large")),
    SCORE.with_gradient().name: ("score, with gradients", ("RNA", "springs")),
    f"{LOG_DENSITY.name}, float64": ("log-density, float64", ("",)),
    LOSS: ("loss, with gradients", ("toy", "RNA", "springs", "CIFAR")),
}
OTHERS = ("torch", "published", "compiled", "keops", "attention", "sklearn")


USED = (
    "table", "name", "implementation", "task", "dtype", "seconds", "memory", "error", "limit", "failed"
)  # fmt: skip


def shown(results: dict[str, Any]) -> dict[str, Any]:
    """The part of the results that `summary` reads: few enough rows for git."""
    rows = [
        {key: row[key] for key in USED if key in row}
        for row in results["rows"]
        if row["table"] in SHOWN and row["name"].startswith(SHOWN[row["table"]][1])
    ]
    return {**results, "rows": rows}


def summary(results: dict[str, Any]) -> list[str]:
    """The page's table: our time, the others' over it, memory, error and share of the limit."""
    heads = ["op", "case", "`cpu`", *(LABELS[name] for name in OTHERS)]
    heads += ["memory: `cpu` / plain", "error: `cpu` / plain", "of the limit"]
    lines = [f"*{Origin.of(results).dated()}*", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for table_name, (label, beginnings) in SHOWN.items():
        rows = [row for row in results["rows"] if row["table"] == table_name and row["name"].startswith(beginnings)]
        for case in dict.fromkeys(row["name"] for row in rows):
            by_name = {row["implementation"]: row for row in rows if row["name"] == case}
            ours, plain = by_name.get("cpu"), by_name.get("published")
            cells = [label, case, time_cell(ours, None)]
            cells += [time_cell(by_name.get(name), ours, ratio_alone=True).replace("–", "") for name in OTHERS]
            memory = [memory_cell(ours), memory_cell(plain)]
            cells.append(" / ".join(memory) if any(memory) else "")
            cells.append(" / ".join(f"{row['error']:.0e}" if row and "error" in row else "–" for row in (ours, plain)))
            cells.append(share(ours, "limit"))
            lines.append("| " + " | ".join(cells) + " |")
    return lines
