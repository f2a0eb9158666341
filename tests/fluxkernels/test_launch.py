"""Tests of the choice among layouts of Triton kernels, and of launches while a graph is captured; no kernel runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fluxkernels as fk

launch = pytest.importorskip("fluxkernels.triton_kernels.launch", reason="triton is not installed")

Layout = tuple[int, int]
CHOICES = ((128, 1), (32, 4), (32, 8))
KEY = ("kde", 2)


class Card:
    """A GPU whose runs take the seconds of `times`, and whose host takes `host` seconds to launch one.

    Attributes:
        ran: choices that were launched, in order.
        noise: added to the times of the launches, in turn.
        now, busy: time of the host, and time at which the GPU will have finished.
    """

    def __init__(self, times: dict[Layout, float], host: float = 2e-5) -> None:
        self.times, self.host = times, host
        self.ran: list[Layout] = []
        self.noise: Iterator[float] = iter(())
        self.now = self.busy = 0.0

    def launch(self, choice: Layout) -> None:
        self.ran.append(choice)
        self.now += self.host
        self.queue(self.times[choice] + next(self.noise, 0.0))

    def queue(self, seconds: float) -> None:
        self.busy = max(self.now, self.busy) + seconds

    def event(self, enable_timing: bool) -> Any:
        return Event(self)

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> "Card":
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 2e9))
        return self


class Event:
    def __init__(self, card: Card) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.at = max(self.card.now, self.card.busy)

    def query(self) -> bool:
        return self.at <= self.card.now

    def synchronize(self) -> None:
        self.card.now = max(self.card.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the file with choices, on a machine with a GPU."""
    monkeypatch.setattr(launch, "CACHE", tmp_path)
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As in a process of its own."""
    launch._chosen.clear()
    launch._known.cache_clear()


@pytest.fixture
def card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A GPU on which the second choice is the fastest."""
    return Card({(128, 1): 3e-3, (32, 4): 1e-3, (32, 8): 2e-3}).replace(monkeypatch)


def chosen(card: Card) -> Layout:
    launch.fastest(KEY, CHOICES, card.launch)
    return card.ran[-1]


def test_the_fastest_is_measured_once_and_kept_for_other_processes(card: Card, folder: Path) -> None:
    assert chosen(card) == (32, 4)
    assert set(card.ran) == set(CHOICES)
    count = len(card.ran)
    assert chosen(card) == (32, 4)
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"kde 2": [32, 4]}
    forget()
    assert chosen(card) == (32, 4)
    assert len(card.ran) == count + 2


def test_kernels_shorter_than_their_launch_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {(128, 1): 5e-6, (32, 4): 4e-6, (32, 8): 6e-6}
    assert chosen(Card(times, host=3e-5).replace(monkeypatch)) == (32, 4)
    for host in (1e-6, 3e-5, 3e-4):  # the longest takes more than the first pause
        seconds = launch._seconds(CHOICES, Card(times, host).replace(monkeypatch).launch)
        assert seconds == pytest.approx(list(times.values()), rel=1e-3)


def test_noise_does_not_decide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal choices give the first, whatever a launch takes longer by chance, in every process."""
    found = set()
    for seed in range(20):
        card = Card(dict.fromkeys(CHOICES, 5e-6)).replace(monkeypatch)
        generator = torch.Generator().manual_seed(seed)
        card.noise = iter(lambda generator=generator: 1e-6 * torch.rand((), generator=generator).item(), None)
        launch.CACHE = folder / str(seed)
        forget()
        found.add(chosen(card))
    assert found == {(128, 1)}


def test_a_moment_when_the_gpu_was_slow_does_not_decide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({(128, 1): 5e-6, (32, 4): 4e-6, (32, 8): 6e-6}).replace(monkeypatch)
    count = launch.MOST_LAUNCHES
    # Two runs of each choice come first; then the first round of the second choice falls into that moment.
    card.noise = iter([0.0] * (6 + count) + [1e-5] * count)
    assert chosen(card) == (32, 4)


def test_a_choice_replaces_the_first_only_if_it_is_clearly_faster(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, expected in ((0.99e-3, (128, 1)), (0.9e-3, (32, 8))):
        forget()
        launch.CACHE = folder / str(seconds)
        assert chosen(Card({(128, 1): 1e-3, (32, 4): 1e-3, (32, 8): seconds}).replace(monkeypatch)) == expected


def test_long_runs_are_repeated_little(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card({(128, 1): 1.0, (32, 4): 0.5, (32, 8): 2.0}).replace(monkeypatch)
    assert chosen(card) == (32, 4)
    assert len(card.ran) == 3 * 2 + 1


def test_nothing_is_measured_while_a_graph_is_captured(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(card) == (128, 1)
    assert card.ran == [(128, 1)]
    assert list(folder.iterdir()) == []


def test_a_capture_takes_the_choice_that_was_measured_before_it(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(card) == (32, 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(card) == (32, 4)


def test_it_can_be_switched_off(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "AUTOTUNE", False)
    assert chosen(card) == (128, 1)
    assert card.ran == [(128, 1)]


@pytest.mark.parametrize("text", ["{", "[1]", '{"kde 2": [7, 7]}', '{"kde 2": 5}'])
def test_a_broken_or_outdated_file_does_no_harm(card: Card, text: str) -> None:
    launch._file("A Card").write_text(text)
    assert chosen(card) == (32, 4)
    assert json.loads(launch._file("A Card").read_text()) == {"kde 2": [32, 4]}


def test_processes_add_to_one_file(card: Card) -> None:
    chosen(card)
    launch._file("A Card").write_text(json.dumps({"of another": [1, 2]}))
    launch.fastest(("kde", 3), CHOICES, card.launch)
    assert json.loads(launch._file("A Card").read_text()) == {
        "of another": [1, 2],
        "kde 2": [32, 4],
        "kde 3": [32, 4],
    }


def test_a_folder_that_cannot_be_written_does_no_harm(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setattr(launch, "CACHE", folder / "file" / "folder")
    assert chosen(card) == (32, 4)


def test_each_device_has_its_own_choice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Card({(128, 1): 1e-3, (32, 4): 1e-3 + d * 1e-3, (32, 8): 5e-4 + d * 1e-3}) for d in range(2)]
    for device, expected in ((0, (32, 8)), (1, (128, 1)), (0, (32, 8))):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: f"Card {device}")
        assert chosen(cards[device].replace(monkeypatch)) == expected


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


class Driver:
    """Triton's view of a GPU, as far as a launch needs it."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A compiled kernel, which counts its launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.function = self.packed_metadata = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None:
        self.launches += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Launch a kernel for that many elements on a GPU whose compiler returns at once."""
    import triton

    from fluxkernels.triton_kernels.philox import normal_kernel

    if launch.INTERPRETED:
        pytest.skip("kernels are interpreted, and never compiled")
    compiled: list[Compiled] = []

    def compile_(*_: Any, **__: Any) -> Compiled:
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    fresh = triton.jit(normal_kernel.fn)
    binder = fresh.create_binder

    def create_binder() -> Any:
        made = binder()
        fresh.compile = compile_  # in place of Triton's, which the binder has set
        return made

    fresh.device_caches.default_factory = create_binder
    pointers = [SimpleNamespace(dtype=dtype, data_ptr=lambda: 0) for dtype in (torch.int64, torch.float32)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def run(elements: int) -> list[int]:
        launch.launch(fresh, (1, 1), *pointers, elements, STREAM=0, BLOCK=1024, **launch.OPTIONS)
        return [each.launches for each in compiled]

    return run


def test_a_kernel_that_a_capture_would_compile_is_refused(
    kernel: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel(32) == [1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernel(48) == [2]  # another multiple of 16 is compiled the same
    with pytest.raises(fk.BackendError, match=r"normal_kernel has not run .* call fluxkernels.warm_up"):
        kernel(33)
    assert kernel(64) == [3]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernel(33) == [3, 1]


def test_hooks_of_others_and_their_kernels_are_left_alone(
    kernel: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    seen: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: seen.append(fn.module) and False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    hook = triton.knobs.runtime.jit_cache_hook
    with launch._nothing_compiled():
        triton.knobs.runtime.jit_cache_hook(fn=SimpleNamespace(module="elsewhere"), key="")
    assert seen == ["elsewhere"]
    assert triton.knobs.runtime.jit_cache_hook is hook
