"""Warming up runs an op with its derivatives, and changes nothing else."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fluxkernels as fk
from fluxkernels import warming
from tests.support.ops import OPS, Op

pytestmark = pytest.mark.usefixtures("backend")


class Calls(TorchDispatchMode):
    """Record the arguments of all registered ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "fluxkernels":
            self.made.setdefault(name, []).append(args)
        return func(*args, **(kwargs or {}))


X = torch.randn(2, 6, 3)
INPUTS: dict[str, Any] = {
    "x": X, "refs": torch.randn(2, 5, 3), "xt": torch.randn(2, 4, 3), "values": torch.randn(2, 4, 2), "field": X + 1,
    "per_query": torch.full((2, 6), 0.5), "per_group": torch.tensor([0.5, 0.6]), "tau": 0.5, "h": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_runs_with_its_derivatives(op: Op) -> None:
    given = op.given(INPUTS)
    with Calls() as calls:
        fk.warm_up(op.function, **given, **({"seed": 3} if op.noise else {}))
    assert set(calls.made) >= {kernel.name for kernel in op.kernels}
    assert all(not t.requires_grad and t.grad is None for t in given.values() if isinstance(t, torch.Tensor))


def test_cotangents_come_in_both_layouts() -> None:
    with Calls() as calls:
        fk.warm_up(fk.kde_mean, X, X, 0.5)
    assert [args[1].stride() for args in calls.made["kde_backward"]] == [(18, 3, 1), (0, 0, 0)]


def test_derivatives_can_be_left_out() -> None:
    with Calls() as calls:
        fk.warm_up(fk.kde_score, X, X, 0.5, derivatives=False)
    assert list(calls.made) == ["kde"]


def test_functions_of_ops_with_several_results() -> None:
    with Calls() as calls:
        fk.warm_up(
            lambda x, refs: {"a": [fk.kde_score(x, refs, 0.5)], "b": (fk.kde_log_density(x, refs, 1.0), None)}, X, X
        )
    assert (len(calls.made["kde"]), len(calls.made["kde_backward"])) == (2, 4)


def test_random_numbers_stay_those_of_the_user() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    fk.warm_up(fk.flux_pass, X, X, 0.5, 1.0)
    assert torch.equal(torch.randn(3), expected)


def test_a_capture_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "capturing", lambda: True)
    with pytest.raises(fk.BackendError, match=r"warm_up: a CUDA graph is captured, .* call it before"):
        fk.warm_up(fk.kde_score, X, X, 0.5)
