"""Tests of the choice among layouts of Triton kernels; no kernel runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

launch = pytest.importorskip("fluxkernels.triton_kernels.launch", reason="triton is not installed")

CHOICES = [(128, 1), (32, 4), (32, 8)]
TIMES = {(128, 1): 3.0, (32, 4): 1.0, (32, 8): 2.0}
ran: list[tuple[int, int]] = []


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a GPU on which runs take the seconds of TIMES; yields the folder of its file."""

    def seconds(run: Callable[[], None]) -> float:
        run()
        return TIMES[ran[-1]]

    monkeypatch.setattr(launch, "CACHE", tmp_path)
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch, "_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch._known.cache_clear()
    ran.clear()
    yield tmp_path
    launch._known.cache_clear()


def test_the_fastest_is_measured_once_and_kept_for_other_processes(card: Path) -> None:
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran == [*CHOICES, (32, 4)]
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran[4:] == [(32, 4)]
    (file,) = card.iterdir()
    assert json.loads(file.read_text()) == {"kde 2": [32, 4]}
    launch._known.cache_clear()  # as in a process of its own
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran[5:] == [(32, 4)]


def test_nothing_is_measured_while_a_graph_is_captured(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran == [(128, 1)]
    assert list(card.iterdir()) == []


def test_it_can_be_switched_off(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "AUTOTUNE", False)
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran == [(128, 1)]


def test_a_broken_or_outdated_file_does_no_harm(card: Path) -> None:
    launch._file("A Card").write_text("{")
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran[-1] == (32, 4)
    launch._file("A Card").write_text(json.dumps({"kde 2": [7, 7]}))
    launch._known.cache_clear()
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran[-1] == (128, 1)


def test_a_folder_that_cannot_be_written_does_no_harm(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (card / "file").touch()
    monkeypatch.setattr(launch, "CACHE", card / "file" / "folder")
    launch.fastest("kde 2", CHOICES, ran.append)
    assert ran[-1] == (32, 4)


@pytest.mark.parametrize(
    ("queries", "groups", "refs", "preferred"),
    [
        (256, 2000, 256, (128, 1)),  # threads for the whole GPU
        (1024, 1, 1024, (32, 4)),
        (33, 1, 65, (32, 8)),
        (33, 1, 20, (32, 4)),  # at least a few reference points per lane
        (33, 1, 3, (128, 1)),
    ],
)
def test_lanes_where_queries_are_few(queries: int, groups: int, refs: int, preferred: tuple[int, int]) -> None:
    found = launch.layouts(queries, groups, refs, torch.device("cpu"))
    assert found[0] == preferred
    assert set(found) <= set(launch.LAYOUTS)
