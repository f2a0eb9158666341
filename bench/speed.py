"""The results of `pytest bench`: kept as dated JSON, shown as Markdown tables.

No time stands in a table whose answer is wrong.
"""

import math
from typing import Any

import torch

from bench.bench_loss import LOSS
from bench.bench_loss import TOLERANCE as LOSS_TOLERANCE
from bench.cases import Case
from bench.limits import ARITHMETIC, model_seconds
from bench.peers import BACKWARD, LOG_DENSITY, PASS, SCORE, tolerance
from bench.records import duration

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
- `cpu` and `torch` are our backends; both compute in float64 and round once. *Plain PyTorch* is the paper's formulas
  with `torch.randn` noise (`bench/peers.py`), in float32 unless said otherwise, of at most 4096 queries of a group at
  once; *whole*: of all at once. *torch.compile* compiles them, *attention* is scaled_dot_product_attention with keys
  and values = centres, *KeOps* is compiled for this processor (`-march=native -ffast-math`), *scikit-learn* is
  `KernelDensity` with its default tolerances, which are zero. In parentheses: the time over that of `cpu`.
- *Error*: relative, in the Euclidean norm, against the `torch` backend in float64 on the same inputs and noise, on the
  first 4 groups and 512 queries; of the loss: its gradient against float64 with exact derivatives. A time whose answer
  is wrong is not printed: above 1e-5 for our ops (gradients of the pass 1e-4), 1e-2 for the peers, half precision and
  the loss. `controllable` has no error here: who draws other numbers is compared by means, in `tests/test_bench.py`.
- *Limit*: the time that the exponentials and multiply-adds of all pairs need in double precision at the best rates
  measured beside the cases (`bench/limits.py`), over the time taken. Above 100 % is who skips pairs that cannot matter,
  or computes in single precision. The loss has none: its network is PyTorch's. *Live*: the share of pairs whose weight
  is above rounding.
- *Memory*: growth of the resident set over one call, results included, in a process of its own that may have 12 GiB;
  empty: not measured.
"""


def keep(raw: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark's JSON says, without the single times, and with the share of the limit in each row."""
    machine, commit = raw["machine_info"], raw["commit_info"]
    entries = raw["benchmarks"]
    measured = [entry["extra_info"]["rates"] for entry in entries if "rates" in entry["extra_info"]]
    by_threads = max((e["extra_info"].get("threads", 1) for e in entries), default=1)
    # The highest: a machine that others use as well is not always as fast.
    rates = [max((pair[k] for pair in measured), default=math.nan) for k in range(2)]
    rows = []
    for entry in entries:
        info: Row = {name: value for name, value in entry["extra_info"].items() if name != "rates"}
        table, _, name = entry["group"].partition(": ")
        row: Row = {"table": table, "name": name, "who": info.get("who") or entry["params"]["who"], **info}
        if "failed" not in row:
            row["seconds"] = entry["stats"]["median"]
            if row.get("op") in ARITHMETIC:
                share = [rate * row["threads"] / by_threads for rate in rates]
                row["limit"] = model_seconds(row["op"], Case(**row["case"]), (share[0], share[1])) / row["seconds"]
        rows.append(row)
    return {
        "date": raw["datetime"][:10],
        "commit": str(commit.get("id"))[:7] + (" with changes" if commit.get("dirty") else ""),
        "machine": {
            "cpu": machine["cpu"].get("brand_raw", "unknown CPU"),
            "system": machine["system"],
            "python": machine["python_version"],
            **machine["fluxkernels"],
        },
        "rates": rates,
        "rows": rows,
    }


def where(results: dict[str, Any]) -> str:
    """Date, machine, versions and commit in a sentence."""
    machine = results["machine"]
    return (
        f"{results['date']}, {machine['cpu']}, {machine['threads']} threads ({machine['thread_source']}), "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}, instruction set "
        f"{machine['target']}, commit {results['commit']}."
    )


def wrong(row: Row) -> bool:
    if row.get("error") is None:
        return False
    op = row["op"]
    limit = LOSS_TOLERANCE if op == LOSS else tolerance(op, row["who"], getattr(torch, row["dtype"]))
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
    """Markdown of the rows of one table: a line a case, a column for each who runs it."""
    names = [who for who in LABELS if any(row["who"] == who for row in rows)]
    measured = [who for who in names if any("memory" in row for row in rows if row["who"] == who)]
    checked = any("error" in row for row in rows)
    heads = ["case", *(LABELS[who] for who in names)]
    if checked:
        order = " / ".join(LABELS[who] for who in names)
        heads += [f"limit: {order}", "live", f"error: {order}"]
    heads += [f"memory: {LABELS[who]}" for who in measured]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in dict.fromkeys(row["name"] for row in rows):
        by_who = {row["who"]: row for row in rows if row["name"] == case}
        ours = by_who.get("cpu")
        cells = [case, *(time_cell(by_who.get(who), ours) for who in names)]
        if checked:
            found = [by_who.get(who, {}).get("error") for who in names]
            cells += [" / ".join(share(by_who.get(who), "limit") for who in names), share(ours, "live_share")]
            cells += [" / ".join("–" if error is None else f"{error:.0e}" for error in found)]
        cells += [memory_cell(by_who.get(who)) for who in measured]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cores(rows: list[Row]) -> str:
    """Who kept how many cores busy in the calls that take long enough to say."""
    ranges = []
    for who, label in LABELS.items():
        busy = [r["cores"] for r in rows if r["who"] == who and "cores" in r and r.get("seconds", 0) > 0.1]
        if busy:
            ranges.append(f"{label} {min(busy):.1f} to {max(busy):.1f}")
    return f"- Cores busy in calls above 100 ms: {', '.join(ranges) or 'none so long'}."


def document(results: dict[str, Any]) -> str:
    """All tables."""
    exponentials, multiply_adds = results["rates"]
    rows = results["rows"]
    lines = [
        f"# Speed on a CPU, {results['date']}",
        "",
        f"`make bench`, one run, medians. {where(results)} In the same run, all threads together: {exponentials:.2g} "
        f"exponentials and {multiply_adds:.2g} multiply-adds a second, in double precision.",
        "",
        *NOTES.splitlines(),
        cores(rows),
    ]
    lines += ["", *(f"![{what} by size](speed-{what}.png)" for what in ("time", "memory", "limit"))]
    for name in dict.fromkeys(row["table"] for row in rows):
        lines += ["", f"## {name}", "", *table([row for row in rows if row["table"] == name])]
    return "\n".join(lines) + "\n"


# The README's choice, with the beginnings of its cases: what a training step asks for, what others offer too, and what
# it costs in the end.
SHOWN = {
    PASS: ("pass", ("",)),
    SCORE: ("score", ("toy", "RNA", "springs", "many", "large")),
    SCORE + BACKWARD: ("score, with gradients", ("RNA", "springs")),
    f"{LOG_DENSITY}, float64": ("log-density, float64", ("",)),
    LOSS: ("loss, with gradients", ("toy", "RNA", "springs", "CIFAR")),
}
PEERS = ("torch", "published", "compiled", "keops", "attention", "sklearn")


def summary(results: dict[str, Any]) -> list[str]:
    """The README's table: our time, the others' over it, memory, error and share of the limit."""
    heads = ["op", "case", "`cpu`", *(LABELS[who] for who in PEERS)]
    heads += ["memory: `cpu` / plain", "error: `cpu` / plain", "of the limit"]
    lines = [f"*{where(results)}*", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for op, (label, cases) in SHOWN.items():
        rows = [row for row in results["rows"] if row["table"] == op and row["name"].startswith(cases)]
        for case in dict.fromkeys(row["name"] for row in rows):
            by_who = {row["who"]: row for row in rows if row["name"] == case}
            ours, plain = by_who.get("cpu"), by_who.get("published")
            cells = [label, case, time_cell(ours, None)]
            cells += [time_cell(by_who.get(who), ours, ratio_alone=True).replace("–", "") for who in PEERS]
            memory = [memory_cell(ours), memory_cell(plain)]
            cells.append(" / ".join(memory) if any(memory) else "")
            cells.append(" / ".join(f"{row['error']:.0e}" if row and "error" in row else "–" for row in (ours, plain)))
            cells.append(share(ours, "limit"))
            lines.append("| " + " | ".join(cells) + " |")
    return lines
