"""The score as points, centres, dimensions, groups and threads grow: time, and memory up to a limit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.cases import GENES, LARGE, SCALING, Case
from bench.measuring import measure, patient
from bench.peers import ATTENTION, KEOPS, PASS, PUBLISHED, SCORE, WHOLE

WHO = ("cpu", WHOLE, KEOPS, ATTENTION)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("what", "case", "who"),
    [
        pytest.param(what, case, who, id=f"{case.name}-{who}")
        for what, cases in SCALING.items()
        for case in cases
        for who in WHO
        if patient(SCORE, case, who)
    ],
)
def test_sizes(benchmark: Any, what: str, case: Case, who: str) -> None:
    benchmark.group = f"{SCORE} by {what}: {case.name}"
    measure(benchmark, SCORE, case, who, torch.float32, with_memory=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= torch.get_num_threads()])
@pytest.mark.parametrize("who", ["cpu", PUBLISHED])
@pytest.mark.parametrize("op", [SCORE, PASS])
@pytest.mark.parametrize("case", [GENES[1], LARGE[0]], ids=lambda case: case.name)
def test_threads(benchmark: Any, op: str, case: Case, who: str, count: int) -> None:
    torch.set_num_threads(count)
    benchmark.group = f"{op} by threads, {case.name}: {count}"
    measure(benchmark, op, case, who, torch.float32, with_memory=False)
