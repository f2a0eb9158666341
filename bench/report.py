"""Tables, plots and the generated parts of bench/README.md, from the dated JSONs of bench/results.

python -m bench.report bench.json     keeps the results of `pytest bench --benchmark-json=bench.json`, then renders
python -m bench.report                renders everything from the newest results that are there
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import accuracy, plots, records, speed
from bench.gpu import report as gpu
from bench.records import RESULTS
from bench.reliability import results as reliability
from bench.training import cost

Table = Callable[[dict[str, Any]], list[str]]
PAGE = Path(__file__).with_name("README.md")


def keep(raw: Path, folder: Path = RESULTS) -> None:
    """Keep the results of a benchmark run in place of the last ones.

    All rows go into "<date>-speed-cpu-rows.json", which git ignores; the page's into "<date>-speed-cpu.json".
    """
    results = speed.keep(json.loads(raw.read_text()))
    records.keep("speed-cpu-rows", results, results["date"], folder)
    records.keep("speed-cpu", speed.shown(results), results["date"], folder)


def render(folder: Path = RESULTS) -> dict[str, list[str]]:
    """Write the table of all rows and the plots, if the rows are there; return the page's parts by name."""
    if (found := records.newest("speed-cpu-rows", folder)) is not None:
        records.keep_text("speed-cpu", speed.document(found), found["date"], "md", folder)
        plots.draw(folder, found)
    return parts(folder)


def parts(folder: Path = RESULTS) -> dict[str, list[str]]:
    """The generated parts of the page."""
    tables: dict[str, tuple[str, Table]] = {
        "speed": ("speed-cpu", speed.summary),
        "training": ("training-cpu", cost.summary),
        "accuracy": ("accuracy-cpu", accuracy.summary),
        "reliability": ("reliability-cpu", reliability.table),
    }
    found = {}
    for name, (kind, table) in tables.items():
        results = records.newest(kind, folder)
        found[name] = ["No results yet."] if results is None else table(results)
        document = folder / f"{(results or {}).get('date')}-{kind}.md"
        if document.exists():
            found[name] += ["", f"[All rows](results/{document.name})"]
    if (folder / plots.TIME).exists():
        found["speed"] += ["", f"![Time by size](results/{plots.TIME})"]
    return found | {"gpu": gpu.report(folder).splitlines()}


def begin(name: str) -> str:
    return f"<!-- {name}: written by python -m bench.report -->"


END = "<!-- end -->"


def fill(text: str, by_name: dict[str, list[str]]) -> str:
    """Replace the lines between the markers of each part.

    Raises:
        ValueError: a part has no markers in the text.
    """
    for name, lines in by_name.items():
        if text.count(begin(name)) != 1:
            raise ValueError(f"bench/README.md must have one line {begin(name)}")
        before, rest = text.split(begin(name))
        if END not in rest:
            raise ValueError(f"bench/README.md: nothing ends the part {name}; it needs {END}")
        after = rest.split(END, 1)[1]
        text = "\n".join([f"{before}{begin(name)}", *lines, f"{END}{after}"])
    return text


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", help="written by pytest --benchmark-json")
    options = parser.parse_args()
    if options.json and not options.json.exists():
        parser.error(f"there is no file {options.json}")
    if options.json:
        keep(options.json)
    by_name = render()
    PAGE.write_text(fill(PAGE.read_text(), by_name))


if __name__ == "__main__":
    main()
