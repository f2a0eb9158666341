"""Test of the machine code of the Triton kernels for few dimensions: its instructions per pair bound their speed."""

import importlib.util
from typing import Any

import pytest

from tests.fluxkernels.complete import complete_only
from tests.support.processes import run_in_parts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Packing numbers in pairs for its vector instructions costs this GPU more moves than it saves.
EXCEPTIONS = {(16, "langevin_kernel", 100): 72.0}


def budget(row: dict[str, Any], capability: int) -> float:
    return float(EXCEPTIONS.get((row["D"], row["kernel"], capability), row["budget"]))


@complete_only
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_hot_loops_of_streaming_kernels_keep_within_their_budgets(capability: int) -> None:
    """Few instructions per pair, and within a lane no exchange among threads, no spill, no float64."""
    rows = run_in_parts("tests.programs.budgets", capability, TRITON_INTERPRET="0", FLUXKERNELS_AUTOTUNE="0")
    # In two dimensions and in 16; on one architecture with two queries per thread, too.
    assert len(rows) == 21 + 7 + (21 if capability == 90 else 0)
    # One exponential per pair, and one per query and tile in a sweep: the count of pairs is right.
    assert [row for row in rows if not 0 <= row["exponentials"] - row["pairs"] <= 2] == []
    assert [row for row in rows if row["per_pair"] > budget(row, capability)] == []
    assert [row for row in rows if row["exchanges"] or row["spills"] or row["float64"]] == []
