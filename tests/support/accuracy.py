"""Errors of every op that has a truth on the inputs of `cases.py`, beside those of the published formulas."""

from typing import Any

import numpy as np
import torch

import fluxkernels as fk
from tests.support import oracles
from tests.support.cases import Case
from tests.support.ops import BY_NAME, OPS, judged

JUDGED = tuple(op for op in OPS if op.truth is not None)


def inputs(case: Case, end: Any, number: Any = float) -> dict[str, Any]:
    """Inputs of the ops by name, as arrays; `number` rounds σ² and τ."""
    a = case.arrays()
    sigma2 = number(case.sigma2)
    return {
        "x": a["z"],
        "refs": a["refs"],
        "per_query": sigma2,
        "per_group": sigma2,
        "tau": number(case.tau),
        "xt": end,
        "values": a["field"],
        "field": a["field"],
        "chain_noise": a["noise"],
    }


def truths(case: Case, dtype: type[np.floating[Any]] = np.float32) -> dict[str, np.ndarray]:
    """Results in extended precision by the op's label, for inputs rounded to `dtype`.

    "end" has the ends of the chains, rounded: the input on which the transition is judged.
    """

    def number(value: float) -> float:
        return float(dtype(value))

    chain = BY_NAME["langevin_chain"]
    assert chain.truth is not None
    xt = chain.truth(*chain.values(inputs(case, None, number)))
    given = inputs(case, xt.astype(dtype), number)
    found = {op.label: op.truth(*op.values(given)) for op in JUDGED if op.truth is not None and op is not chain}
    return found | {chain.label: xt, "end": given["xt"]}


def as_tensors(case: Case, end: np.ndarray, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value).to(dtype) if isinstance(value, np.ndarray) else value
        for name, value in inputs(case, end).items()
    }


def results(case: Case, end: np.ndarray, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Results of a backend by the op's label."""
    given = as_tensors(case, end, dtype)
    with fk.use_backend(backend):
        return {op.label: judged(op, op.call(given)) for op in JUDGED}


def published_results(case: Case, end: np.ndarray) -> dict[str, torch.Tensor]:
    """Results of the published formulas in float32, without those that take too long."""
    given = as_tensors(case, end)
    return {
        op.label: op.published(*op.values(given))
        for op in JUDGED
        if op.published is not None and not (op.most_published and op.most_published < case.D)
    }


def relative_errors(found: dict[str, torch.Tensor], truth: dict[str, np.ndarray]) -> dict[str, float]:
    return {label: oracles.relative_error(value.numpy(), truth[label]) for label, value in found.items()}


def errors(case: Case, backend: str) -> dict[str, float]:
    """Relative errors of a backend by the op's label."""
    truth = truths(case)
    return relative_errors(results(case, truth["end"], backend), truth)


def errors_beside_published(case: Case, backend: str) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors by the op's label: (the backend's, the published formulas')."""
    truth = truths(case)
    ours = results(case, truth["end"], backend)
    return relative_errors(ours, truth), relative_errors(published_results(case, truth["end"]), truth)


def wrong(case: Case, found: dict[str, float], of_torch: dict[str, float]) -> dict[str, float]:
    """Those of a backend's errors that no sound float32 result has, given the errors of the torch backend."""
    # Weights between points far outside of all reference points hang on digits that their float32 mean does not have.
    factor = 10 if case.far else 1
    limits = {op.label: factor * op.tolerance for op in JUDGED}
    # Beside what an op's float32 input costs in float64 arithmetic. How a number between two float32 ones is rounded is
    # chance: hence 1 %.
    sound = 5e-6 if case.far else 1e-6
    return {
        label: error
        for label, error in found.items()
        if not (error < limits[label] and error <= max(1.01 * of_torch[label], sound))
    }
