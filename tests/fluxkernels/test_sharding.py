"""Reference points shared out over processes give the results and derivatives of all of them in one."""

import pytest
import torch

import fluxkernels as fk
from tests.support.processes import rows_of


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_in_processes_are_the_whole(processes: int) -> None:
    rows = rows_of(processes, "tests.programs.sharded_average")
    assert {row["rank"] for row in rows} == set(range(processes))
    for row in rows:
        assert max(row["errors"].values()) < 1e-9, row


def test_processes_must_have_been_started() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be started first"):
        fk.sharded_kernel_average(torch.randn(3, 2), torch.randn(4, 2), 0.5)
