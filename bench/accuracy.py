"""Errors of every op in float32 against extended precision, beside those of the published formula in float32.

    python -m bench.accuracy [--backend cpu] [--keep]

prints the table; --keep puts it into bench/results. Relative errors in the Euclidean norm, on the inputs of
tests/cases.py.
"""

import argparse
from typing import Any

import numpy as np
import torch

import fluxkernels as fk
from bench import published, records
from tests import oracles
from tests.cases import CASES, Case

OPS = ("score", "mean", "log density", "chain", "weights", "average", "residual")
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
ROUNDING = 2.0**-24  # what rounding a number to float32 costs at most, relative to it


def truths(case: Case) -> dict[str, np.ndarray]:
    a = case.arrays()
    z, refs, s2 = a["z"], a["refs"], float(np.float32(case.sigma2))
    # The transition is judged on the rounded end points, which are its input.
    xt = oracles.langevin_chain(z, refs, s2, case.tau, a["noise"])
    end = xt.astype(np.float32)
    weights = oracles.transition_weights(z, end, refs, s2, float(np.float32(case.tau)))
    return {
        "score": oracles.kde_score(z, refs, s2),
        "mean": oracles.kde_mean(z, refs, s2),
        "log density": oracles.kde_log_density(z, refs, s2),
        "chain": xt,
        "weights": weights,
        "average": weights @ a["field"].astype(np.longdouble),
        "residual": oracles.residual_gradient(z, a["field"], refs, s2),
        "end": end,
    }


def ours(case: Case, end: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    a = {key: torch.from_numpy(value) for key, value in case.arrays().items()}
    z, refs, field, s2, tau = a["z"], a["refs"], a["field"], case.sigma2, case.tau
    with fk.use_backend(backend):
        return {
            "score": fk.kde_score(z, refs, s2),
            "mean": fk.kde_mean(z, refs, s2),
            "log density": fk.kde_log_density(z, refs, s2),
            "chain": fk.langevin_chain(z, refs, s2, tau, noise=a["noise"]),
            "weights": fk.transition_weights(z, end, refs, s2, tau),
            "average": fk.transition_average(z, end, field, refs, s2, tau),
            "residual": fk.residual_gradient(z, field, refs, s2),
        }


def plain(case: Case, end: torch.Tensor) -> dict[str, torch.Tensor]:
    a = {key: torch.from_numpy(value) for key, value in case.arrays().items()}
    z, refs, field, s2, tau = a["z"], a["refs"], a["field"], case.sigma2, case.tau
    weights = published.transition_weights(z, end, refs, s2, tau)
    results = {
        "score": published.kde_score(z, refs, s2),
        "mean": published.kde_mean(z, refs, s2),
        "log density": published.kde_log_density(z, refs, s2),
        "chain": published.langevin_chain(z, refs, s2, tau, a["noise"]),
        "weights": weights,
        "average": weights @ field,
    }
    if case.D <= 200:  # its exact divergence takes one backward pass for each coordinate
        results["residual"] = published.residual_gradient(z, field, refs, s2)
    return results


def errors(case: Case, backend: str, *, with_plain: bool = True) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors by op: (ours, the published formula's)."""
    truth = truths(case)
    end = torch.from_numpy(truth.pop("end"))

    def compare(results: dict[str, torch.Tensor]) -> dict[str, float]:
        return {op: oracles.relative_error(value.numpy(), truth[op]) for op, value in results.items()}

    return compare(ours(case, end, backend)), compare(plain(case, end)) if with_plain else {}


def wrong(case: Case, found: dict[str, float], of_torch: dict[str, float]) -> dict[str, float]:
    """Those of a backend's errors that no sound float32 result has, beside the errors of the torch backend."""
    # Weights between points far outside of all centres hang on digits that their float32 mean does not have.
    limit = 1e-4 if case.far else 1e-5
    # All compute in float64 and round once, so the error is that rounding, or what an op's float32 input costs. How a
    # number between two float32 ones is rounded is chance: hence 1 %.
    return {
        op: error for op, error in found.items() if not (error < limit and error <= 1.01 * max(of_torch[op], ROUNDING))
    }


def measure(backend: str, cases: list[Case] = CASES) -> dict[str, Any]:
    """(ours, published formula's or None) of every op by the case's name, with date, machine and commit."""
    by_case = {}
    for case in cases:
        mine, theirs = errors(case, backend)
        by_case[case.name] = {op: (mine[op], theirs.get(op)) for op in OPS}
    return {
        "date": records.today(),
        "machine": records.machine(),
        "commit": records.commit(),
        "backend": backend,
        "errors": by_case,
    }


def where(results: dict[str, Any]) -> str:
    return records.where(results["machine"], results["commit"])


def table(results: dict[str, Any], ops: tuple[str, ...] = OPS, cases: tuple[str, ...] = ()) -> list[str]:
    """Markdown: one row a case, each cell 'ours / published formula'; of these cases alone, if there are any."""
    lines = ["| case | " + " | ".join(ops) + " |", "|---" * (len(ops) + 1) + "|"]
    for name in cases or tuple(results["errors"]):
        found = (results["errors"][name][op] for op in ops)
        cells = [f"{mine:.0e} / {'–' if theirs is None else f'{theirs:.0e}'}" for mine, theirs in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def document(results: dict[str, Any]) -> str:
    """All cases and ops."""
    backend = results["backend"]
    lines = [
        f"# Accuracy of the {backend} backend, {results['date']}",
        "",
        f"`python -m bench.accuracy --backend {backend} --keep`: relative error in the Euclidean norm against",
        "extended precision (NumPy longdouble), float32 inputs of tests/cases.py. Each cell: fluxkernels / the formula",
        f"as published, in float32 PyTorch (bench/published.py). {where(results)}",
        "A dash: not computed, the published divergence takes one backward pass for each coordinate.",
        "",
        *table(results),
    ]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> list[str]:
    """The README's table."""
    return [
        f"*{results['date']}, {where(results)}*",
        "",
        *table(results, SHOWN_OPS, SHOWN),
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.accuracy", description=__doc__.splitlines()[0])
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
