"""The choice of a backend: order of precedence, reasons, one warning."""

import subprocess
import sys
import warnings

import pytest
import torch

import fluxkernels as fk
from fluxkernels import backend as module
from fluxkernels import reference

X = torch.zeros(1, 1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    monkeypatch.delenv(module.ENVIRONMENT, raising=False)


def with_entry(monkeypatch: pytest.MonkeyPatch, name: str, missing: str | None) -> None:
    entry = module._ENTRIES[name]
    changed = module._Entry(entry.what, entry.devices, lambda: missing, lambda: reference)
    monkeypatch.setitem(module._ENTRIES, name, changed)


def test_automatic_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "triton"):
        with_entry(monkeypatch, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [fk.resolve_backend(None, d) for d in ("cpu", "cuda", "mps")] == ["cpu", "triton", "torch"]


def test_automatic_choice_warns_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry(monkeypatch, "cpu", "no compiler was found")
    with pytest.warns(UserWarning, match="'cpu' is not available .no compiler was found") as caught:
        assert [fk.resolve_backend(None, "cpu") for _ in range(2)] == ["torch", "torch"]
    assert len(caught) == 1


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry(monkeypatch, "cpu", None)
    assert fk.resolve_backend(None, "cpu") == "cpu"
    monkeypatch.setenv(module.ENVIRONMENT, "torch")
    assert fk.resolve_backend(None, "cpu") == "torch"
    with fk.use_backend("cpu"):
        assert fk.resolve_backend(None, "cpu") == "cpu"
        assert fk.resolve_backend("torch", "cpu") == "torch"
        with fk.use_backend("torch"):
            assert fk.resolve_backend(None, "cpu") == "torch"
        assert fk.resolve_backend(None, "cpu") == "cpu"


def test_use_backend_ends_with_an_error() -> None:
    with pytest.raises(KeyError), fk.use_backend("torch"):
        raise KeyError
    assert module._in_use.get() is None


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry(monkeypatch, "cpu", "no compiler was found")
    with pytest.raises(fk.BackendError, match="'cpu' was asked for but cannot run: no compiler was found"):
        fk.kde_score(X, X, 1.0, backend="cpu")
    monkeypatch.setenv(module.ENVIRONMENT, "cpu")
    with pytest.raises(fk.BackendError):
        fk.kde_score(X, X, 1.0)


def test_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry(monkeypatch, "triton", None)
    with pytest.raises(fk.BackendError, match="'triton' takes tensors on cuda, got cpu"):
        fk.kde_score(X, X, 1.0, backend="triton")


def test_unknown_names_say_where_they_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'torch', 'cpu', 'triton', got 'gpu'"):
        fk.kde_score(X, X, 1.0, backend="gpu")
    with pytest.raises(ValueError, match="use_backend: name must be one of"), fk.use_backend("gpu"):
        pass
    monkeypatch.setenv(module.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match=r"FLUXKERNELS_BACKEND must be one of .* got 'gpu'"):
        fk.kde_score(X, X, 1.0)


def test_table() -> None:
    table = fk.backends()
    assert list(table) == ["torch", "cpu", "triton"]
    assert table["torch"].available
    assert all(row.available == (row.missing is None) for row in table.values())


def test_command_prints_versions_backends_and_reasons() -> None:
    done = subprocess.run([sys.executable, "-m", "fluxkernels"], capture_output=True, text=True, check=True)
    assert f"fluxkernels {fk.__version__}, torch {torch.__version__}" in done.stdout
    for row in fk.backends().values():
        assert f"  {row.name}" in done.stdout
        assert row.available or row.missing in done.stdout
    assert "cpu tensors run on: " in done.stdout
    assert done.stderr == ""


def test_package_example_runs() -> None:
    import doctest

    import fluxmatching

    for package in (fk, fluxmatching):
        failed, attempted = doctest.testmod(package)
        assert attempted > 2
        assert failed == 0
