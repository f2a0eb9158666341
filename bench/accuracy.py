"""Errors of every op in float32 against extended precision, beside those of the published formula in float32.

    python -m bench.accuracy [--backend torch]

prints the README's table. Relative errors in the Euclidean norm, on the inputs of tests/cases.py.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

import fluxkernels as fk
from bench import published
from tests import oracles
from tests.cases import CASES, Case

OPS = ("score", "mean", "log density", "chain", "weights", "average", "residual")


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


def table(backend: str, cases: list[Case] = CASES, show: Callable[[str], None] = print) -> None:
    """Markdown: one row a case, each cell 'ours / published formula'."""
    show("| case | " + " | ".join(OPS) + " |")
    show("|---" * (len(OPS) + 1) + "|")
    for case in cases:
        mine, theirs = errors(case, backend)
        cells = [f"{mine[op]:.0e} / {f'{theirs[op]:.0e}' if op in theirs else '–'}" for op in OPS]
        show(f"| {case.name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch")
    table(parser.parse_args().backend)


if __name__ == "__main__":
    main()
