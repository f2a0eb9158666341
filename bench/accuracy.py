"""Errors of every op in float32 against extended precision, beside those of the published formula in float32.

    python -m bench.accuracy [--backend cpu] [--keep]

prints the table; --keep puts it into bench/results. Relative errors in the Euclidean norm, on the inputs of
tests/support/cases.py.
"""

import argparse
from typing import Any

import fluxkernels as fk
from bench import records
from bench.origin import Origin
from tests.support.accuracy import JUDGED, errors_beside_published
from tests.support.cases import CASES, Case

OPS = tuple(op.label for op in JUDGED)
SHOWN_OPS = ("score", "log density", "chain", "weights", "residual")
SHOWN = (
    "plain",
    "offset 1000, spread 1",
    "offset 1000, D = 200",
    "sigma2 = 4e-6",
    "sigma2 = 4e-6, D = 3072",
    "sigma2 = 6400, D = 3072",
    "duplicates, D = 17, sigma2 = 4e-6",
    "M much larger than N",
    "far queries",
    "tau = 0",
)


def measure(backend: str, cases: list[Case] = CASES) -> dict[str, Any]:
    """(ours, published formula's or None) of every op by the case's name, with the origin."""
    by_case = {}
    for case in cases:
        mine, theirs = errors_beside_published(case, backend)
        by_case[case.name] = {op: (mine[op], theirs.get(op)) for op in OPS}
    return {**Origin.here().fields(), "backend": backend, "errors": by_case}


def table(results: dict[str, Any], ops: tuple[str, ...] = OPS, cases: tuple[str, ...] = ()) -> list[str]:
    """Markdown: one row per case, each cell 'ours / published formula'; of these cases alone, if there are any."""
    lines = ["| case | " + " | ".join(ops) + " |", "|---" * (len(ops) + 1) + "|"]
    for name in cases or tuple(results["errors"]):
        found = (results["errors"][name][op] for op in ops)
        cells = [f"{mine:.0e} / {'–' if theirs is None else f'{theirs:.0e}'}" for mine, theirs in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def document(results: dict[str, Any]) -> str:
    """Markdown with all cases and ops."""
    backend = results["backend"]
    lines = [
        f"# Accuracy of the {backend} backend, {results['date']}",
        "",
        f"`python -m bench.accuracy --backend {backend} --keep`: relative error in the Euclidean norm against",
        "extended precision (NumPy longdouble), float32 inputs of tests/support/cases.py. Each cell: fluxkernels / the",
        f"formula as published, in float32 PyTorch (tests/support/published.py). {Origin.of(results).sentence()}",
        "A dash: not computed, the published divergence takes one backward pass for each coordinate.",
        "",
        *table(results),
    ]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> list[str]:
    """The page's table."""
    return [
        f"*{Origin.of(results).dated()}*",
        "",
        *table(results, SHOWN_OPS, SHOWN),
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch", choices=[n for n, b in fk.backends().items() if b.available])
    parser.add_argument("--keep", action="store_true", help="as JSON and Markdown in bench/results")
    options = parser.parse_args()
    results = measure(options.backend)
    print("\n".join(table(results)))
    if options.keep:
        kind = f"accuracy-{options.backend}"
        records.keep(kind, results, results["date"])
        records.keep_text(kind, document(results), results["date"], "md")


if __name__ == "__main__":
    main()
