"""The checks of reliability find errors, keep each other's results, and report what they could not do."""

import json
import operator
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.reliability import __main__ as command
from bench.reliability import correctness, results, resume, sanitizer, soak, wheels
from bench.reliability.checks import CHECKS, Check
from fluxkernels import cpu
from tests.support import accuracy
from tests.support.cases import CASES, Case

needs_cpu = pytest.mark.skipif(cpu.missing() is not None, reason=f"the cpu backend cannot run: {cpu.missing()}")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small steps wait for a second core where another process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rss(megabytes_a_minute: float) -> list[tuple[float, float]]:
    """66 samples in 11 minutes of a process that takes about 400 MB."""
    rng = random.Random(0)
    return [(10.0 * k, 4e8 + 1e6 * (megabytes_a_minute * k / 6 + rng.uniform(-3, 3))) for k in range(66)]


def test_a_resident_set_that_rises_is_a_leak_and_one_that_does_not_is_none() -> None:
    grown, slope = soak.growth(rss(5))
    assert grown == pytest.approx(5 * 44 / 6, abs=3)
    assert slope == pytest.approx(300, rel=0.1)
    assert soak.leaks(rss(5))
    assert not soak.leaks(rss(0))
    assert not soak.leaks(rss(-5))
    peak = rss(0)
    peak[40] = (peak[40][0], 9e8)  # one sample among many is no growth
    assert not soak.leaks(peak)


@needs_proc
def test_soak_makes_steps_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    every_op = soak.call_every_op
    monkeypatch.setattr(soak, "call_every_op", lambda *_: None)
    found = soak.check(minutes=1.5 / 60, warm_up=0.3)
    assert found["steps"] > 10
    assert 3 <= len(found["samples"]) <= soak.LEAST_SAMPLES
    assert "steps in 0.025 min: resident set" in soak.describe(found)
    every_op(random.Random(0), "torch")
    with pytest.raises(ValueError, match=r"minutes must be more than the 1 of its warm-up, got 0\.5"):
        soak.check(minutes=0.5)


def moment(seed: int) -> float:
    """Return the moment at which the training of that seed is first killed, from 0 to 1."""
    rng = random.Random(seed)
    rng.randint(1, 1)
    return rng.uniform(0, 1)


SEED = next(s for s in range(100) if moment(s) < 0.2)


def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "MOST_KILLS", 1)
    kills, identical = resume.trial(tmp_path, seed=SEED, iterations=100)
    assert kills == 1
    assert identical


def in_this_process(folder: Path, seed: int, iterations: int, _: float | None) -> bool:
    resume.train(folder, seed, iterations)
    return False


@pytest.mark.parametrize("tampered", [False, True])
def test_other_weights_in_a_checkpoint_are_seen(
    tampered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "train_and_kill", in_this_process)
    resume.train(tmp_path / "parts", 3, iterations=4)
    if tampered:
        last = tmp_path / "parts" / resume.LAST
        state = torch.load(last, weights_only=True)
        state["loss"]["field.0.weight"][0, 0] += 1e-6
        torch.save(state, last)
    assert resume.trial(tmp_path, 3, iterations=8) == (0, not tampered)


def test_a_training_that_cannot_go_on_reports_why(tmp_path: Path) -> None:
    (tmp_path / resume.LAST).write_bytes(b"no")
    with pytest.raises(RuntimeError, match=r"seed 5 ended with 1: (.|\n)*no checkpoint in .* can be read"):
        resume.train_and_kill(tmp_path, 5, 10, None)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.ones(2), torch.ones(2).double(), False),
        ({"w": [1, 2.0]}, {"w": [1, 2.5]}, False),
        ({"w": 1}, {"v": 1}, False),
    ],
)
def test_same_is_to_the_last_bit(a: Any, b: Any, expected: bool) -> None:
    assert resume.same(a, b) is expected


@needs_cpu
@pytest.mark.parametrize("error", [0.0, 1e-8])
def test_fuzz_counts_inputs_and_wrong_results(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kde = cpu.kde
    monkeypatch.setattr(cpu, "kde", lambda *args: tuple(result * (1 + error) for result in kde(*args)))
    found = correctness.of_random_inputs(seconds=1.0)
    assert found["inputs"] > 0
    assert found["passed"] is (error == 0), found


@needs_cpu
def test_adversarial_cases_are_counted_by_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "interpreted", lambda: iter([("triton, interpreted", "plain", 9, {"mean": 0.1})]))
    tried = 2 * len(accuracy.JUDGED)
    found = correctness.of_cases(CASES[:2])
    of_cpu = {f"cpu {target}": {"tried": tried, "passed": tried} for target in cpu._kernels.targets()}
    assert found["backends"]["torch"] == {"tried": tried, "passed": tried}
    assert of_cpu.items() <= found["backends"].items()
    assert found["backends"]["triton, interpreted"] == {"tried": 9, "passed": 8}
    assert not found["passed"]
    assert found["failures"] == ["triton, interpreted: plain, mean: error 1.0e-01"]


@needs_cpu
def test_a_wrong_backend_fails_adversarial_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    results = accuracy.results

    def wrong(case: Case, end: np.ndarray, backend: str) -> dict[str, torch.Tensor]:
        found = results(case, end, backend)
        return found | {"score": found["score"] * (1 + 1e-6)} if backend == "cpu" else found

    monkeypatch.setattr(accuracy, "results", wrong)
    monkeypatch.setattr(correctness, "interpreted", lambda: iter(()))
    backends = correctness.of_cases(CASES[:1])["backends"]
    assert backends["torch"]["passed"] == len(accuracy.JUDGED)
    assert backends[f"cpu {cpu._kernels.target()}"]["passed"] == len(accuracy.JUDGED) - 1


FUZZ = {"passed": True, "inputs": 7, "calls": 56, "seconds": 10.0, "failures_in_all": 0}
RESUME = {"passed": False, "trials": 3, "kills": 4, "identical": 2}


def test_one_check_keeps_the_entries_of_the_others(tmp_path: Path) -> None:
    results.keep("resume", RESUME, "abc", tmp_path)
    older = tmp_path / "2020-01-01-reliability-cpu.json"
    (file,) = tmp_path.iterdir()
    file.rename(older)
    file = results.keep("fuzz", FUZZ, "def", tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    found = json.loads(file.read_text())
    assert list(found["checks"]) == ["fuzz", "resume"]
    assert [entry["commit"] for entry in found["checks"].values()] == ["def", "abc"]
    assert found["checks"]["resume"]["identical"] == 2
    assert {"cpu", "threads", "system", "python", "torch"} <= set(found["machine"])
    assert found["commit"] == "def"
    assert file.name.startswith(found["checks"]["fuzz"]["date"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reliability", *arguments])
    command.main()


def test_the_command_runs_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        asked.append((name, arguments))
        return FUZZ if name == "fuzz" else RESUME

    monkeypatch.setattr(command, "measure", measure)
    run(monkeypatch, "--only", "fuzz", "--seconds", "10", "--output", str(tmp_path))
    with pytest.raises(SystemExit, match="failed: resume"):
        run(monkeypatch, "--only", "resume", "--trials", "3", "--output", str(tmp_path))
    assert asked == [("fuzz", {"seconds": 10.0}), ("resume", {"trials": 3})]
    assert list(results.newest(tmp_path)["checks"]) == ["fuzz", "resume"]
    assert "7 inputs, 56 calls in 10 s: 0 wrong |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "everything"), "invalid choice: 'everything'"),
        (("--seconds", "0"), "argument --seconds: must be positive and finite, got 0"),
        (("--seconds", "nan"), "argument --seconds: must be positive and finite, got nan"),
        (("--trials", "0"), "argument --trials: must be at least 1, got 0"),
        (("--minutes", "1"), "--minutes must be more than the 1 of the warm-up, got 1"),
        (("--pythons", "2.7"), "invalid choice: '2.7'"),
        (("--only", "wheels", "--fetch"), "--fetch needs uv, which was not found"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("broken", "error"), [(os.abort, "BrokenProcessPool"), (operator.index, "TypeError")])
def test_a_check_that_breaks_has_failed(
    broken: Callable[..., Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS, "fuzz", Check(broken, "", str))
    entry = command.measure("fuzz", {})
    assert not entry["passed"]
    assert results.result("fuzz", entry).startswith(f"**failed**: {error}: ")


def test_table_of_what_passed_failed_and_could_not_run() -> None:
    checks = {
        "fuzz": FUZZ,
        "adversarial": {
            "passed": True,
            "cases": 62,
            "backends": {"torch": {"tried": 9, "passed": 9}, "triton": {"skipped": "is not installed"}},
        },
        "resume": RESUME,
        "soak": {"passed": True, "steps": 900, "minutes": 12.0, "grown_mb": -0.25, "slope_mb_per_hour": 3.0},
        "sanitizer": {"skipped": "there is no g++"},
        "wheels": {"passed": True, "pythons": {"3.10": {"skipped": "not found"}, "3.11": {"error": 1e-9}}},
    }
    when = {"date": "2030-01-02", "commit": "0123456"}
    head, line, *rows = results.table({"checks": {name: {**entry, **when} for name, entry in checks.items()}})
    assert (head, line) == ("| check | what was done | result | date, commit |", "|---|---|---|---|")
    assert {row.split(" | ")[-1] for row in rows} == {"2030-01-02, 0123456 |"}
    assert [f"{row.split(' | ')[-2]} |" for row in rows] == [
        "7 inputs, 56 calls in 10 s: 0 wrong |",
        "62 cases; right: `torch` 9 of 9, `triton` is not installed |",
        "**failed**: 2 of 3 identical bit for bit, after 4 kills |",
        "900 steps in 12 min: resident set -0.2 MB (trend +3 MB per hour) |",
        "not run: there is no g++ |",
        "Python 3.10 not found, 3.11 installed and ran |",
    ]


def test_without_a_compiler_the_sanitizers_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sanitizer, "library", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/g++")
    assert "g++ has no libasan.so, g++ has no libstdc++.so" in sanitizer.check()["skipped"]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert sanitizer.check() == {"skipped": "there is no g++"}


def test_tests_and_reports_of_the_sanitizers_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    assert sanitizer.count(file) == {"tests_passed": 0, "tests_failed": 0}  # pytest did not live to write it
    file.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>')
    assert sanitizer.count(file) == {"tests_passed": 4, "tests_failed": 2}
    printed = "==7==ERROR: AddressSanitizer: heap-buffer-overflow\nkde.h:3:69: runtime error: signed integer overflow"
    assert len(sanitizer.REPORT.findall(printed)) == 2


def interpreter(folder: Path, version: str) -> Path:
    """A command that prints that version, or fails if it has none."""
    folder.mkdir(parents=True)
    python = folder / "python3.12"
    python.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    python.chmod(0o755)
    return python


def test_an_interpreter_must_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, version in (("shims", ""), ("other", "3.9"), ("bin", "3.12")):
        interpreter(tmp_path / folder, version)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("shims", "other")))
    assert wheels.find("3.12") is None
    of_pyenv = interpreter(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin", "3.12")
    assert wheels.find("3.12") == of_pyenv
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert wheels.find("3.12") == tmp_path / "bin" / "python3.12"


def test_missing_interpreters_and_failed_installs_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*_: Any) -> str:
        raise RuntimeError("no matching distribution")

    monkeypatch.setattr(wheels, "build_sdist", lambda folder: folder)
    monkeypatch.setattr(wheels, "find", lambda version: sys.executable if version == "3.11" else None)
    monkeypatch.setattr(wheels, "install_and_call", lambda *_: "3.11.7 2.13.0 1e-09\n")
    found = wheels.check(["3.11", "3.12"])
    assert found["passed"]
    assert wheels.describe(found) == "Python 3.11 installed and ran, 3.12 not found"
    monkeypatch.setattr(wheels, "install_and_call", install)
    found = wheels.check(["3.11", "3.12"])
    assert not found["passed"]
    assert found["pythons"]["3.11"] == {"failed": "no matching distribution"}
    assert wheels.describe(found) == "Python 3.11 failed, 3.12 not found"
    assert wheels.check(["3.12"]) == {"skipped": "no Python 3.12 was found"}


def test_wheels_are_tried_on_every_python_of_the_package() -> None:
    listed = metadata.metadata("fluxkernels").get_all("Classifier") or []
    prefix = "Programming Language :: Python :: 3."
    assert [name.removeprefix(prefix) for name in listed if name.startswith(prefix)] == [
        version.removeprefix("3.") for version in wheels.PYTHONS
    ]


def test_the_checkout_is_not_lent_to_an_empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert wheels.run(sys.executable, "-c", "import os; print('PYTHONPATH' in os.environ)", cwd=tmp_path) == "False\n"
    with pytest.raises(RuntimeError, match=r"-c import sys.*: why"):
        wheels.run(sys.executable, "-c", "import sys; sys.exit('why')", cwd=tmp_path)
