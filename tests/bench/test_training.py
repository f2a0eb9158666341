"""The evidence and the cost of training steps are computed as their tables describe."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import timing
from bench.gpu import report as gpu_report
from bench.training import cost, evidence, presets, results, velocity
from bench.training.problems import MIXTURE, images
from experiments.fast_mixing import experiment as fast_mixing
from experiments.fast_mixing.mixture import trained


def test_variance_is_the_trace_of_the_covariance() -> None:
    gradients = torch.randn(7, 5, dtype=torch.float64)
    sums = evidence.Sums()
    for g in gradients:
        sums.add(g, torch.zeros(5), 1.0)
    assert sums.variance == pytest.approx(gradients.var(0).sum().item())
    assert sums.deviations == pytest.approx(gradients.square().sum().item())


def test_evidence_of_the_small_problem() -> None:
    network, data = MIXTURE.make(pretrained=20)
    problem = dataclasses.replace(MIXTURE, batch=64)  # no longer that problem itself: without compiled methods
    measured = evidence.measure(problem, 0.5, network, data, minibatches=3)
    errors = {
        name: (s.deviations / measured["float32: double_backward"].squares) ** 0.5 for name, s in measured.items()
    }
    assert errors["float32: double_backward"] == 0
    assert errors["float32: forward_over_reverse"] < 1e-5
    assert 1e-7 < errors["float32: **finite_difference**"] < 1e-3
    assert errors["float32: **finite_difference**"] < errors["float32: finite_difference, step × 10"] < 0.1
    assert 1e-3 < errors["bfloat16: **finite_difference**"] < 0.3
    lines = evidence.rows(problem, 0.5, measured)
    assert len(lines) == len(evidence.FLOAT32) + len(evidence.BFLOAT16) - 2
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert cells == ["mixture, perceptron, σ = 0.5", "float32: double_backward", "0e+00", "1.00", "1.00", "1.00"]


def test_evidence_leaves_the_library_as_it_was() -> None:
    before = evidence.second_derivatives.RELATIVE_STEP
    network, data = MIXTURE.make()
    evidence.gradient(evidence.FLOAT32[4], network, data[:8], 0.5, seed=1)
    assert before == evidence.second_derivatives.RELATIVE_STEP


def test_a_method_that_fails_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    network, data = MIXTURE.make()
    gradient = evidence.gradient
    monkeypatch.setattr(
        evidence,
        "gradient",
        lambda method, *a, **k: (gradient if method is evidence.EXACT else broken)(method, *a, **k),
    )
    measured = evidence.measure(dataclasses.replace(MIXTURE, batch=8), 0.5, network, data, minibatches=2)
    assert "fails: RuntimeError" in evidence.rows(MIXTURE, 0.5, measured)[1]


def test_images_have_the_spectrum_of_photographs() -> None:
    pictures = images(200, torch.Generator().manual_seed(0))
    assert pictures.shape == (200, 3, 32, 32)
    assert pictures.std().item() == pytest.approx(0.5)
    power = torch.fft.rfft2(pictures).abs().square().mean((0, 1))
    # Amplitude 1/(frequency + 1/32): from frequency 2/32 to 8/32 the power falls by (9/3)².
    assert (power[2, 0] / power[8, 0]).item() == pytest.approx(9, rel=0.2)


SETTING = cost.Setting("springs", "tiny", 4, width=16)


def test_cost_of_a_small_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "peak_memory", lambda *_: 1000)
    rows = cost.measure(SETTING, "cpu", repetitions=2)
    assert [row["method"] for row in rows] == list(cost.METHODS)
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["kde"] > 0


def test_a_compiled_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "peak_memory", lambda *_: 1000)
    compiled = torch.compile
    # The tracing alone: Inductor's compilation takes a minute, and tests of the ops have it.
    monkeypatch.setattr(torch, "compile", lambda loss, **_: compiled(loss, backend="aot_eager"))
    setting = cost.Setting("points", "points", 8, size=0, width=8, run="compiled")
    rows = cost.measure(setting, "cpu", repetitions=1)
    assert [row["method"] for row in rows] == ["score matching", "flux"]
    assert all(row["seconds"] > 0 for row in rows)


def row(method: str, **figures: Any) -> dict[str, Any]:
    return {"setting": dataclasses.asdict(SETTING), "method": method, **figures}


def test_table_shows_ratios_and_failures() -> None:
    rows = [
        row("score matching", seconds=0.1, memory=2e9, kde=0.002),
        row("flux", seconds=0.2, memory=3e9),
        row("double backward", failed="OutOfMemoryError: much text"),
    ]
    assert cost.table(rows) == [
        "| tiny | score matching | 100 ms (10 it/s) | – | 2.00 GB | – | – |",
        "| tiny | flux | 200 ms (5 it/s) | 2.00 × | 3.00 GB | 1.50 × | 1.0% |",
        "| tiny | double backward | OutOfMemoryError | | | | |",
    ]


def test_the_papers_speed_stands_beside_ours() -> None:
    rows = [row("score matching", seconds=0.1, memory=1e9, kde=0.001), row("flux", seconds=0.2, memory=1e9)]
    for each in rows:
        each["setting"] |= {"paper": (11.63, 4.01)}
    score_matching, flux = cost.table(rows)
    assert "10 it/s; paper: 11.6" in score_matching
    assert "5 it/s; paper: 4.01" in flux


def test_a_method_that_cannot_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(_: cost.Setting, method: str, __: str) -> int:
        if method == "flux":
            raise MemoryError("too large")
        return 1

    monkeypatch.setattr(cost, "peak_memory", peak)
    rows = cost.measure(SETTING, "cpu", repetitions=1)
    assert [r["method"] for r in rows if "failed" in r] == ["flux"]
    assert rows[1]["failed"] == "MemoryError: too large"


def gpu_row(implementation: str, seconds: float, error: float, **others: Any) -> dict[str, Any]:
    run = {"kind": "score", "name": "tiny"}
    return {
        "run": run,
        "implementation": implementation,
        "seconds": {"median": seconds},
        "memory": 10**6,
        "error": error,
        **others,
    }


GPU_MACHINE = dict.fromkeys(("card", "driver", "cuda", "triton", "system", "python", "torch", "threads"), "0")
GPU_ORIGIN = {"date": "2030-01-02", "commit": "0123456", "machine": GPU_MACHINE}


def test_gpu_report_has_no_figure_of_a_wrong_answer() -> None:
    graph = {"graph": {"median": 1e-3}, "limit_seconds": 5e-4, "pairs_per_second": 1e9}
    results = {**GPU_ORIGIN, "tests": None}
    baselines = [gpu_row("plain PyTorch", 0.01, 1e-4), gpu_row("KeOps", 0.002, 0.5)]
    lines = gpu_report.table(results | {"rows": [gpu_row("triton", 2e-3, 1e-6, **graph), *baselines]})
    assert "| score | tiny | 2 ms | 1 ms | 1.0e+09 | 50% | 5 × | – | wrong | 1 / 1 | 1e-06 / 1e-04 / 5e-01 |" in lines
    unjudged = {name: value for name, value in baselines[0].items() if name != "error"}
    lines = gpu_report.table(results | {"rows": [gpu_row("triton", 2e-3, 1e-6, **graph), unjudged]})
    assert "| score | tiny | 2 ms | 1 ms | 1.0e+09 | 50% | wrong | – | – | 1 / – | 1e-06 / – / – |" in lines
    lines = gpu_report.table(results | {"rows": [gpu_row("triton", 1e-3, 0.9, **graph), *baselines]})
    assert "| score | tiny | wrong | | | | | | | | 9e-01 / 1e-04 / 5e-01 |" in lines


def test_gpu_report_shows_training_steps() -> None:
    rows = [row("score matching", seconds=0.1, memory=1e9, kde=0.001), row("flux", seconds=0.2, memory=1e9)]
    lines = gpu_report.table({**GPU_ORIGIN, "tests": None, "rows": [], "training": rows})
    assert lines[-2:] == cost.table(rows)


def test_gpu_report_shows_the_fit_of_velocities() -> None:
    found = {"steps": {"torch": 0.3, "triton": 0.01}, "fit": 12.3}
    lines = gpu_report.table({**GPU_ORIGIN, "tests": None, "rows": [], "velocity": found})
    assert (
        "a fit of 100 epochs over 3696 cells and 2000 genes 12.3 s; a step 10 ms, on the torch backend 30.0 ×"
        in lines[-1]
    )
    lines = gpu_report.table({**GPU_ORIGIN, "tests": None, "rows": [], "velocity": {"failed": "no anndata"}})
    assert lines[-1] == "RNA velocity: no anndata."


def test_steps_and_fits_of_velocities_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GENES", 4), ("BATCH", 16), ("PANCREAS", 40)):
        monkeypatch.setattr(velocity, name, value)
    seconds = velocity.step_seconds(torch.device("cpu"), ["torch", "cpu"], repetitions=2)
    assert list(seconds) == ["torch", "cpu"]
    assert min(seconds.values()) > 0
    assert velocity.fit_seconds(torch.device("cpu"), epochs=2) > 0


def test_made_cells_are_as_wide_as_real_ones() -> None:
    made = velocity.made_cells(200, 500)
    deviations = {key: float(np.median(made.layers[key].std(0))) for key in ("Mu", "Ms")}
    assert deviations["Mu"] == pytest.approx(0.02, rel=0.4)
    assert deviations["Ms"] == pytest.approx(0.14, rel=0.4)


def test_results_replace_the_last_ones_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.records, "RESULTS", tmp_path)
    for name in ("2020-01-01-training-cpu.md", "2020-01-01-training-gpu.md"):
        (tmp_path / name).write_text("old")
    with results.begin("training", torch.device("cpu")) as write:
        write("new")
    with results.begin("training", torch.device("cpu"), keep=False) as write:
        write("not kept")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2
    assert files[0] == "2020-01-01-training-gpu.md"
    text = (tmp_path / files[1]).read_text()
    assert text.endswith("new\n")
    assert f"{torch.get_num_threads()} threads" in text


def test_presets_are_timed_and_their_trainings_added_up() -> None:
    rows = list(presets.measured("smoke", torch.device("cpu"), num_steps=1))
    found = {(row["experiment"], row["objective"]) for row in rows}
    assert found == {
        ("springs", "flux"), ("springs", "DSM"), ("images", "flux"), ("images", "DSM"),
        *(("fast_mixing", objective) for objective in ("fast flux", "flux", "DSM")),
        *(("fast_mixing, mixture", name) for name in trained(fast_mixing.EXPERIMENT.presets["smoke"])),
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows)
    row = {"experiment": "springs", "objective": "flux", "iterations": 1000, "count": 6, "seconds": 0.6}
    assert presets.line(row | {"gigabytes": 2.0}) == "| springs | flux | 600 ms | 2.0 GB | 1000 × 6 | 1 h |"
    assert "OutOfMemoryError" in presets.line(row | {"failed": "OutOfMemoryError: 80 GB"})


def test_times_on_a_gpu_are_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing", reason="triton is not installed")

    def do_bench(call: Any, rep: float, quantiles: Any = None, return_mode: str = "mean") -> Any:
        call()
        return [100 * q for q in quantiles] if quantiles else {"min": 1.0, "mean": 5.0}[return_mode]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    calls: list[None] = []
    assert timing.on_gpu(lambda: calls.append(None)) == pytest.approx({"p10": 0.01, "median": 0.05, "p90": 0.09})
    assert timing.fastest_on_gpu(lambda: calls.append(None)) == pytest.approx(1e-3)
    assert len(calls) == 2
