"""The check of a card keeps what it has measured whatever happens, and fails if an answer of ours is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import recipes, records
from bench.gpu import __main__ as command
from bench.gpu import rates, report, worker
from bench.gpu.progress import Progress
from bench.gpu.runs import OURS, RUNS
from bench.gpu.worker import CardLostError, Step
from bench.origin import Origin
from bench.tasks import PASS, SCORE
from bench.workloads import CIFAR, TOY

MACHINE = dict.fromkeys(("driver", "cuda", "triton", "system", "python", "torch", "threads"), "0") | {"card": "A Card"}
LATE = 1e18
RATES = {"exponentials": 4e12, "multiply_adds": 3e13, "product": 3e13, "product_int8": 9e14, "bytes": 4e12}


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    return Progress.begin(Origin("2030-01-02", "0123456", MACHINE), tmp_path)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that works."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def lose(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)


def written(progress: Progress) -> dict[str, Any]:
    return Progress.load(progress.file).results


def adds(name: str, **options: Any) -> Step:
    def run(progress: Progress, _: float) -> None:
        progress.results["rows"].append(ours(name))

    return Step(name, run, **options)


def fails(name: str, problem: BaseException) -> Step:
    def run(progress: Progress, _: float) -> None:
        raise problem

    return Step(name, run)


def ours(name: str, **changes: Any) -> dict[str, Any]:
    row = {"run": {"kind": "score", "name": name}, "implementation": OURS, "error": 1e-7, "bound": 1e-5}
    times = {"seconds": {"median": 2e-3}, "graph": {"median": 1e-3}, "limit_seconds": 5e-4, "pairs_per_second": 1e9}
    return {**row, **times, "memory": 10**6, **changes}


def test_the_file_is_there_before_anything_is_measured(progress: Progress) -> None:
    assert progress.file.name == "2030-01-02-gpu-A-Card.json"
    assert written(progress)["rows"] == []


def test_a_write_cut_short_leaves_the_last_results(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(file: Path, text: str) -> None:
        file.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        progress.save()
    assert written(progress)["rows"] == []


def test_results_of_an_older_day_stay_until_the_new_ones_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = records.keep("kind", {"a": 1}, "2029-01-01", tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        records.keep("kind", {"a": 2}, "2030-01-01", tmp_path)
    assert json.loads(old.read_text()) == {"a": 1}


@pytest.mark.usefixtures("card")
def test_a_step_that_fails_leaves_the_others(progress: Progress) -> None:
    steps = [fails("rates", ValueError("no")), adds("first"), fails("velocity", MemoryError("large")), adds("last")]
    worker.work(progress, LATE, steps)
    results = written(progress)
    assert [row["run"]["name"] for row in results["rows"]] == ["first", "last"]
    assert results["failed"] == {"rates": "ValueError: no", "velocity": "MemoryError: large"}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit(1)])
def test_a_step_that_is_interrupted_leaves_what_was_measured(progress: Progress, problem: BaseException) -> None:
    def run(progress: Progress, _: float) -> None:
        progress.results["rows"].append(ours("half"))
        raise problem

    with pytest.raises(type(problem)):
        worker.work(progress, LATE, [adds("first"), Step("second", run), adds("never")])
    assert [row["run"]["name"] for row in written(progress)["rows"]] == ["first", "half"]


def test_a_lost_card_ends_the_process_and_another_goes_on(
    progress: Progress, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [adds("first"), fails("second", RuntimeError("an illegal memory access")), adds("third")]
    with monkeypatch.context() as lost:
        lose(lost)
        with pytest.raises(CardLostError):
            worker.work(progress, LATE, steps)
    again = Progress.load(progress.file)
    assert (again.results["begun"], list(again.results["failed"])) == (["first", "second"], ["second"])
    worker.work(again, LATE, steps)
    assert [row["run"]["name"] for row in written(progress)["rows"]] == ["first", "third"]


@pytest.mark.usefixtures("card")
def test_late_steps_are_left_out(progress: Progress) -> None:
    worker.work(progress, 0, [adds("a"), adds("b", optional=False)])
    assert (written(progress)["left_out"], written(progress)["begun"]) == (["a"], ["b"])


def measured(monkeypatch: pytest.MonkeyPatch, limit: dict[str, float] | None = RATES, **calls: Any) -> list[Any]:
    """Rows of the first run whose contenders are these calls; times are those of a fake card."""
    monkeypatch.setattr(worker, "contenders", lambda *_: calls)
    monkeypatch.setattr(worker, "errors", lambda _: {OURS: 2e-5, "plain PyTorch": 1e-3})
    monkeypatch.setattr(worker, "on_gpu", lambda call: call() or {"median": 1e-3})
    monkeypatch.setattr(worker, "graph_of", lambda call: call)
    monkeypatch.setattr(worker, "gpu_peak_memory", lambda *_, **__: 1)
    monkeypatch.setattr(type(RUNS[0]), "inputs", lambda _: (None, None))
    rows: list[Any] = []
    for row in worker.measure(RUNS[0], limit, LATE):
        rows.append(row)
    return rows


def work_of(problem: Exception | None = None) -> Any:
    def call() -> None:
        if problem:
            raise problem

    return call


@pytest.mark.usefixtures("card")
def test_predicted_and_measured_times_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = rates.model_seconds(RATES, RUNS[0].task, RUNS[0].workload)
    rows = measured(monkeypatch, **{OURS: work_of(), "plain PyTorch": work_of(MemoryError("large"))})
    first, second = capsys.readouterr().out.splitlines()
    assert f"measured 1000.0 us, predicted {1e6 * expected:.1f} us, ratio {1e-3 / expected:.2f}" in first
    assert "error 2.0e-05, bound 1e-05" in first
    assert second.endswith("MemoryError: large")
    assert (rows[0]["error"], rows[1]["failed"]) == (2e-5, "MemoryError: large")
    measured(monkeypatch, None, **{OURS: work_of()})
    assert "measured 1000.0 us; error" in capsys.readouterr().out


def test_contenders_after_the_card_is_lost_are_not_blamed(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch)
    with pytest.raises(CardLostError):
        measured(monkeypatch, **{OURS: work_of(RuntimeError("an illegal memory access")), "plain PyTorch": work_of()})


def test_above_16_dimensions_the_prediction_is_that_of_digit_products() -> None:
    slow = RATES | {"product_int8": 9e13}
    seconds = rates.model_seconds(slow, SCORE, CIFAR)
    assert seconds == pytest.approx(13 * 2 * CIFAR.pairs * CIFAR.dimensions / 9e13)
    assert rates.model_seconds(slow, PASS, CIFAR) > rates.model_seconds(RATES, PASS, CIFAR)
    assert rates.model_seconds(slow, PASS, TOY) == rates.model_seconds(RATES, PASS, TOY)


def recipe(error: float = 1e-7, **more: Any) -> dict[str, Any]:
    return {"name": "SVGD", "shapes": "5", "ours": 1e-3, "dense": 2e-3, "error": error, "dense_error": 1e-6, **more}


def test_a_wrong_recipe_has_no_time() -> None:
    assert recipes.line(recipe()) == "| SVGD | 5 | 1 ms | 2 ms | 2.00 | 1.0e-07 | 1.0e-06 |"
    assert recipes.line(recipe(error=float("nan"))) == "| SVGD | 5 | wrong | – | – | – | – |"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": [ours("a", error=2e-5)]}, "score, a: error 2.0e-05 above 1e-05"),
        ({"rows": [ours("a", error=float("nan"))]}, "score, a: error nan above 1e-05"),
        ({"rows": [ours("a", failed="CompilationError: no")]}, "score, a: CompilationError: no"),
        ({"recipes": [recipe(error=2e-5)]}, "SVGD, 5: error 2.0e-05, bound 1e-05"),
        ({"recipes": [recipe(error=float("nan"))]}, "SVGD, 5: error nan, bound 1e-05"),
        ({"recipes": [recipe(failed="OutOfMemoryError: no")]}, "SVGD, 5: OutOfMemoryError: no"),
        ({"tests": {"passed": False, "summary": []}}, "the GPU tests failed"),
        ({"failed": {"rates": "ValueError: no"}}, "rates: ValueError: no"),
        ({"crashes": [{"step": "a", "reason": "the card was lost"}]}, "a: the card was lost"),
        ({"interrupted": True}, "interrupted"),
    ],
)
def test_the_check_fails_for_answers_of_ours(progress: Progress, changes: dict[str, Any], problem: str) -> None:
    progress.results |= changes
    assert progress.problems() == [problem]


def test_the_check_does_not_fail_for_baselines_or_lack_of_time(progress: Progress) -> None:
    baseline = ours("a", failed="MemoryError: large") | {"implementation": "plain PyTorch"}
    progress.results["rows"] = [ours("a"), baseline, ours("b", failed="TimeoutError: no time was left")]
    progress.results |= {
        "tests": {"passed": True, "summary": []},
        "left_out": ["c"],
        "velocity": {"failed": "no anndata"},
    }
    assert progress.problems() == []


# A process that measures, without its imports, which take seconds.
PROCESS = """
import json, os, signal, sys, time
file = sys.argv[1]
results = json.load(open(file))
def save():
    json.dump(results, part := open(file + ".part", "w"))
    part.close()
    os.replace(file + ".part", file)
for step in ("a", "b", "c"):
    if step not in results["begun"]:
        results["begun"].append(step)
        save()
        if step == "b":
            {what}
        results["rows"].append(step)
        save()
"""


def process(progress: Progress, what: str) -> list[str]:
    return [sys.executable, "-c", PROCESS.format(what=what), str(progress.file)]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with status -11"),
        ("sys.exit(3)", "the card was lost"),
        ("time.sleep(100)", "no result for 2 s"),
    ],
)
def test_after_a_crash_the_next_step_has_its_turn(progress: Progress, what: str, reason: str) -> None:
    command.supervise(progress.file, process(progress, what), patience=2)
    results = written(progress)
    assert results["rows"] == ["a", "c"]
    assert results["crashes"] == [{"step": "b", "reason": reason}]


def test_a_process_that_cannot_start_is_not_started_for_ever(progress: Progress) -> None:
    command.supervise(progress.file, [sys.executable, "-c", "raise ImportError"])
    assert written(progress)["crashes"] == [{"step": "start", "reason": "the process ended with status 1"}]


def test_sigterm_ends_the_process_and_keeps_the_results(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    def soon() -> None:
        while written(progress)["begun"] != ["a", "b"]:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, command.end)
    thread = threading.Thread(target=soon)
    thread.start()
    try:
        command.check(progress, Namespace(skip_tests=True), process(progress, "time.sleep(100)"))
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    results = written(progress)
    assert (results["rows"], results["interrupted"]) == (["a"], True)


def test_tests_that_hang_count_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    found = command.run_tests()
    assert not found["passed"]
    assert "timed out after 600 seconds" in found["summary"][0]


def test_the_exit_status_is_that_of_the_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--skip-tests", "--output", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command.Origin, "here", lambda *_: Origin("2030-01-02", "0123456", MACHINE))

    def supervise(file: Path, _: Any) -> None:
        progress = Progress.load(file)
        progress.results["rows"] = [ours("a", error=error)]
        progress.save()

    monkeypatch.setattr(command, "supervise", supervise)
    error = 1e-7
    command.main()
    error = 1e-3
    with pytest.raises(SystemExit, match="score, a: error"):
        command.main()


def test_the_report_copes_with_files_cut_short(progress: Progress, tmp_path: Path) -> None:
    (tmp_path / "2030-01-01-gpu-Broken.json").write_text("{")
    (tmp_path / "2030-01-01-gpu-Empty.json").write_text("{}")
    assert "**A Card**, 2030-01-02" in report.report(tmp_path)
    baseline = ours("b") | {"implementation": "plain PyTorch"}
    progress.results |= {
        "rows": [ours("a", limit_seconds=None), baseline, ours("c", failed="RuntimeError: no")],
        "crashes": [{"step": "score: c", "reason": "the card was lost"}],
        "failed": {"rates": "ValueError: no"},
        "left_out": ["training: d"],
        "velocity": {"steps": {"torch": 0.2, "triton": 0.1}},
        "training": [{"setting": {"name": "net", "paper": None}, "method": "flux", "failed": "CardLostError: no"}],
        "tests": {"passed": False, "summary": []},
    }
    progress.save()
    text = report.report(tmp_path)
    assert "| score | a | 2 ms | 1 ms | 1.0e+09 | – | – |" in text
    assert "| score | b | – |" in text
    assert "| score | c | RuntimeError |" in text
    assert "tests: no summary." in text
    assert "a fit of 100 epochs over 3696 cells and 2000 genes not measured; a step 100 ms" in text
    assert (
        "Not measured: score: c: the card was lost; rates: ValueError; left out for lack of time: training: d." in text
    )
