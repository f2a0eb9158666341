"""`python -m fluxkernels`: what it reports, and that a broken backend makes it fail."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxkernels as fk
from fluxkernels import __main__ as command
from fluxkernels import backend, doctor, environment, reference, selfcheck

ROOT = Path(__file__).parents[2]


class Broken:
    """The reference implementation, but for one function."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __getattr__(self, name: str) -> Any:
        return self.function if name == self.name else getattr(reference, name)


def scaled(function: Any, factor: float) -> Any:
    return lambda *args, **options: tuple(None if t is None else factor * t for t in function(*args, **options))


def failing(*_: Any, **__: Any) -> Any:
    raise OSError("the library\n  cannot be loaded")


def replace_cpu(monkeypatch: pytest.MonkeyPatch, implementation: Any, missing: str | None = None) -> None:
    entry = backend._Entry("compiled C++", ("cpu",), lambda: missing, lambda: implementation)
    monkeypatch.setitem(backend._ENTRIES, "cpu", entry)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.variables_set():
        monkeypatch.delenv(name)


def test_this_installation_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    text = capsys.readouterr().out
    for row in (row for row in fk.backends().values() if row.available):
        for dtype in ("float32", "float64"):
            assert re.search(rf"^  {row.name} cpu {dtype} .* OK ", text, flags=re.MULTILINE)
    assert "FAILED" not in text
    assert str(environment.CACHE) in text


@pytest.mark.parametrize(
    ("function", "broken", "message"),
    [
        ("kde", scaled(reference.kde, 1.001), "kde_score, 2 dimensions: error 1.0e-03"),
        ("kde", scaled(reference.kde, float("nan")), "kde_score, 2 dimensions: error inf"),
        ("flux_pass", failing, "flux_pass, 2 dimensions: OSError: the library cannot be loaded"),
    ],
    ids=["inexact", "NaN", "raises"],
)
def test_a_broken_backend_fails(
    function: str, broken: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_cpu(monkeypatch, Broken(function, broken))
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^  cpu cpu float32 .* FAILED ", text, flags=re.MULTILINE)
    assert re.search(r"^  torch cpu float32 .* OK ", text, flags=re.MULTILINE)
    assert message in text


def test_a_broken_reference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with formulas of its own, not only with itself."""
    entry = backend._ENTRIES["torch"]
    broken = backend._Entry(entry.what, (), entry.missing, lambda: Broken("kde", scaled(reference.kde, 1.001)))
    monkeypatch.setitem(backend._ENTRIES, "torch", broken)
    failed = {check.op for check in selfcheck.run() if check.backend == "torch" and not check.passed}
    assert failed >= {"kde_score", "one reference point"}


def test_every_public_op_is_checked() -> None:
    ops = {name for name in fk.__all__ if name.startswith(("kde_", "langevin_", "residual_", "transition_", "flux_"))}
    # A step is a chain of one, and the average computes the weights.
    assert ops - {"langevin_step", "transition_weights"} <= set(selfcheck.OPS)


def test_checks_end_in_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selfcheck, "SECONDS", -1.0)
    assert command.main([]) == 0
    assert "0 calls, " in (text := capsys.readouterr().out)
    assert "18 calls left out for lack of time" in text


def test_json_has_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_cpu(monkeypatch, Broken("kde", scaled(reference.kde, 1.001)))
    monkeypatch.setenv("FLUXKERNELS_BACKEND", "torch")
    assert command.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in report["backends"]] == list(fk.backends())
    assert report["runs_on"]["cpu"] == "torch"
    assert report["environment"] == {"FLUXKERNELS_BACKEND": "torch"}
    assert not report["healthy"]
    assert {check["backend"] for check in report["checks"] if not check["passed"]} == {"cpu"}
    assert any("FLUXKERNELS_BACKEND overrides" in note for note in report["notes"])


def test_without_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_cpu(monkeypatch, Broken("kde", failing), missing="it was left out")
    assert command.main(["--no-check"]) == 0
    text = capsys.readouterr().out
    assert "Self-check" not in text
    assert "missing: it was left out" in text
    assert command.main(["--no-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] is None


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.compiler() is None
    assert command.main(["--no-check"]) == 0
    assert "C++ compiler: not found" in (text := capsys.readouterr().out)
    assert "no C++ compiler was found" in text


def test_the_chosen_compiler_is_the_one_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -I")
    assert doctor.compiler() == f"Python {sys.version.split()[0]}"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert doctor.compiler() is None


def test_no_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor.triton_version() is None
    assert command.main(["--no-check"]) == 0
    assert "Triton not installed" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert any("pip install triton" in note for note in doctor._notes_on_software(doctor._versions()))


def test_old_triton_and_untested_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = doctor._versions() | {"Triton": "3.5.1"}
    assert any("Triton 3.5.1 is too old" in note for note in doctor._notes_on_software(versions))
    assert not any("untested" in note for note in doctor._notes_on_software(versions))
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert any("PyTorch 2.99.0+cpu is untested" in note for note in doctor._notes_on_software(versions))


def test_the_interpreter_of_an_old_triton_with_a_new_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "INTERPRETED", True)
    for triton, numpy, fails in (("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.6", False)):
        notes = doctor._notes_on_software(doctor._versions() | {"Triton": triton, "NumPy": numpy})
        assert any("the interpreter of Triton" in note for note in notes) == fails


def test_a_misspelled_variable_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXKERNELS_BACKND", "torch")
    assert any("FLUXKERNELS_BACKND" in note for note in doctor._notes_on_software(doctor._versions()))


def test_notes_on_cards() -> None:
    refused = "cuda:0, Tesla T4 of compute capability 7.5: Triton supports compute capability 8.0 and newer"
    cards = [
        doctor.Card("Tesla T4", (7, 5), 2**34, refused),
        doctor.Card("NVIDIA H200", (9, 0), 2**37, None),
        doctor.Card("NVIDIA GeForce RTX 4090", (8, 9), 2**34, None),
    ]
    notes = doctor._notes_on_cards(cards)
    assert notes[0].startswith(refused)
    assert [("H200" in note, "RTX 4090" in note) for note in notes[1:]] == [(False, True), (False, False)]
    assert "8.9" in notes[2]


def test_the_table_has_every_variable_of_the_source_tree() -> None:
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("fluxkernels", "python_api", "experiments", "bench", "tests"):
        files += (ROOT / folder).rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    assert set(re.findall(r"FLUX(?:KERNELS|MATCHING)_[A-Z]+", text)) == set(environment.VARIABLES)


HEAVY = ("diffusers", "lightning_fabric", "matplotlib", "pandas", "scipy", "sympy", "torch._dynamo", "triton")


@pytest.mark.parametrize("package", ["fluxkernels", "fluxmatching"])
def test_importing_is_light(package: str) -> None:
    """Beyond what PyTorch itself imports: each of these takes up to seconds, and is imported where it is used."""
    code = f"import sys, torch; before = set(sys.modules); import {package}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & set(HEAVY) == set()
