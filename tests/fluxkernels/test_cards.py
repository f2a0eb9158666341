"""Cards and releases of Triton that are known to fail have their reason before a kernel runs."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fluxkernels as fk
from fluxkernels import backend, cards

NAMES = {(7, 5): "Tesla T4", (9, 0): "NVIDIA H200", (13, 0): "A Newer Card"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The compute capabilities of a machine's cards, for the test to fill in; its Triton imports."""
    found: list[tuple[int, int]] = []
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAMES[found[index]])
    entry = backend._ENTRIES["triton"]
    fresh = backend._Entry(entry.what, ("cuda",), backend._triton_missing, entry.implementation, cards.refused)
    monkeypatch.setitem(backend._ENTRIES, "triton", fresh)
    forget()
    yield found
    forget()


def forget() -> None:
    backend._triton_missing.cache_clear()
    cards.refused.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_supported_cards_have_no_reason(capability: tuple[int, int], version: str) -> None:
    """With the assembler of the Triton that is installed here."""
    assert cards.failure(capability, version) is None


def test_cards_older_than_triton_supports() -> None:
    assert cards.failure((7, 5), "3.9.0") == "Triton supports compute capability 8.0 and newer"


def test_cards_newer_than_the_assembler() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    reason = cards.failure((42, 0), "3.6.0")
    assert reason == "the assembler of Triton 3.6.0 does not know sm_420a; pip install --upgrade triton"


def test_an_assembler_that_cannot_be_asked_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(subprocess, "run", fail)
    assert cards.failure((42, 0), "3.6.0") is None


def test_known_failures_are_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cards.Failure(lambda card: card[0] == 10, lambda triton: triton < (3, 7), "its products do not compile")
    monkeypatch.setattr(cards, "KNOWN", (known,))
    assert cards.failure((10, 3), "3.6.1") == "its products do not compile"
    assert cards.failure((10, 3), "3.7.0+git1234") is None
    assert cards.failure((9, 0), "3.6.1") is None


def test_the_oldest_release_is_the_declared_one() -> None:
    declared = re.search(r'"triton>=(\d+)\.(\d+)', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert declared
    assert (int(declared[1]), int(declared[2])) == cards.OLDEST_TRITON
    assert cards.release("3.10.0") > cards.release("3.6.0+git7416ffcb") == (3, 6)


def test_a_good_card_is_taken(machine: list[tuple[int, int]]) -> None:
    machine.append((9, 0))
    assert fk.backends()["triton"].available
    assert fk.resolve_backend(None, "cuda") == "triton"


def test_a_bad_card_has_its_reason_in_the_table_the_error_and_the_warning(machine: list[tuple[int, int]]) -> None:
    machine.append((7, 5))
    reason = "cuda:0, Tesla T4 of compute capability 7.5: Triton supports compute capability 8.0 and newer"
    assert fk.backends()["triton"].missing == reason
    with pytest.raises(fk.BackendError, match=f"'triton' was asked for but cannot run: {reason}"):
        fk.resolve_backend("triton", "cuda:0")
    with pytest.warns(UserWarning, match=reason):
        assert fk.resolve_backend(None, "cuda:0") == "torch"


def test_of_several_cards_each_has_its_own_reason(machine: list[tuple[int, int]]) -> None:
    machine += [(9, 0), (7, 5), (13, 0)]
    row = fk.backends()["triton"]
    assert row.available
    assert [reason.split(",")[0] for reason in row.refused] == ["cuda:1", "cuda:2"]
    for device in ("cuda", "cuda:0"):
        assert fk.resolve_backend("triton", device) == "triton"
    with pytest.raises(fk.BackendError, match="cannot run: cuda:1, Tesla T4"):
        fk.resolve_backend("triton", "cuda:1")
    with pytest.warns(UserWarning, match="cuda:2, A Newer Card .* does not know sm_130a"):
        assert fk.resolve_backend(None, "cuda:2") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fk.resolve_backend(None, "cuda:2") == "torch"
        assert fk.resolve_backend(None, "cuda:0") == "triton"


def test_an_old_triton_is_named_before_its_kernels_are_imported(
    machine: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.append((9, 0))
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.5.1")
    monkeypatch.setattr(backend, "_triton", lambda: pytest.fail("imported"))
    assert fk.backends()["triton"].missing == (
        "Triton 3.5.1 is too old, the kernels need 3.6 or newer; pip install --upgrade triton"
    )


def test_the_command_names_cards_that_are_refused(
    machine: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    from fluxkernels import __main__

    machine += [(9, 0), (7, 5)]
    assert __main__.main(["--no-check"]) == 0
    printed = capsys.readouterr().out
    assert "cuda:0: NVIDIA H200, compute capability 9.0, 16 GiB" in printed
    assert "cuda:1: Tesla T4, compute capability 7.5" in printed
    assert "but not on cuda:1, Tesla T4 of compute capability 7.5: Triton supports" in printed
