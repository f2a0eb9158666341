"""The project's reliability figures, 25 to 40 minutes, in one JSON: bench/results/<date>-reliability-cpu.json.

python -m bench.reliability [--only CHECK ...]     checks left out keep the entries that they have
"""

from __future__ import annotations

import argparse
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.origin import checked_out
from bench.records import RESULTS
from bench.reliability import results, soak, wheels
from bench.reliability.checks import CHECKS, Entry


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability", description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    add("--seconds", type=positive, default=120.0, help="of fuzz")
    add("--trials", type=at_least_one, default=20, help="of resume")
    add("--minutes", type=positive, default=12.0, help="of soak; the first one is its warm-up")
    add("--pythons", nargs="+", choices=wheels.PYTHONS, default=list(wheels.PYTHONS), help="of wheels")
    add("--torch", default=wheels.TORCH, help="of wheels: what pip is to install first; options of pip may follow")
    add("--fetch", action="store_true", help="wheels: let uv download a Python that is not here")
    add("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    if "soak" in options.only and 60 * options.minutes <= soak.WARM_UP:
        parser.error(f"--minutes must be more than the {soak.WARM_UP / 60:g} of the warm-up, got {options.minutes:g}")
    if options.fetch and shutil.which("uv") is None:
        parser.error("--fetch needs uv, which was not found")
    return options


def measure(name: str, arguments: dict[str, Any]) -> Entry:
    """Run a check in a process of its own: one that crashes fails its check and no other."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(CHECKS[name].run, **arguments).result()
        except Exception as problem:  # whatever a check raises is its result
            return {"passed": False, "failed": f"{type(problem).__name__}: {problem}"[:2000]}


def main() -> None:
    options = parse()
    arguments: dict[str, dict[str, Any]] = {
        "fuzz": {"seconds": options.seconds},
        "resume": {"trials": options.trials},
        "soak": {"minutes": options.minutes},
        "wheels": {"pythons": options.pythons, "torch": options.torch, "fetch": options.fetch},
    }
    head = checked_out()  # once: the first entry that is kept changes the checkout
    failed = []
    for name in dict.fromkeys(options.only):
        print(f"{name}: {CHECKS[name].what}", flush=True)
        entry = measure(name, arguments.get(name, {}))
        file = results.keep(name, entry, head, options.output)
        print(f"{name}: {results.result(name, entry)}\n", flush=True)
        failed += [] if entry.get("passed", True) else [name]
    print("\n".join(results.table(results.newest(options.output))))
    print(f"\n{file}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
