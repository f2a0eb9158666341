"""All implementations of the benchmarks compute the same, and the report has what was measured."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baselines, bench_loss, limits, memory, plots, report, speed
from bench import bench_controllable as controllable
from bench.origin import Origin
from bench.tasks import AVERAGE, LOG_DENSITY, PASS, SCORE, TASKS, WEIGHTS, Task
from bench.workloads import FAMILIES, GENES, SCALING, TOY, Workload, phase_portraits
from experiments.controllable.metrics import flux_losses

SMALL = [
    Workload("genes", 3, 40, 40, 2, 0.001, phase_portraits),
    Workload("smooth genes", 3, 40, 40, 2, 0.2, phase_portraits),
    Workload("points", 1, 70, 70, 3, 0.3),
    Workload("more reference points", 2, 20, 300, 20, 2.0),
]


def ours(family: controllable.Family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    arguments = (controllable.make_controls(), controllable.THETA, family, controllable.BATCH, controllable.MINIBATCHES)
    return flux_losses(*arguments, generator, "torch")


def test_controllable_baseline_has_the_same_loss() -> None:
    torch.manual_seed(2)
    controls = controllable.make_controls()
    a, b = ours("violating"), controllable.published_losses(controls, "violating")
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * error
    assert a.mean() > 2 * error
    scale = a.abs().mean()
    assert ours("preserving").abs().max() < 1e-8 * scale
    assert controllable.published_losses(controls, "preserving").abs().max() < 1e-6 * scale


TRANSITION_GRADIENTS = [task.with_gradient() for task in (WEIGHTS, AVERAGE, PASS)]


def contenders(task: Task) -> list[str]:
    # torch.compile and the gradients of KeOps take a compilation of up to a minute each.
    slow = {baselines.COMPILED} | ({baselines.KEOPS} if task.backward else set())
    return [name for name in (*baselines.BACKENDS, *baselines.baselines_of(task)) if name not in slow]


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
@pytest.mark.parametrize(
    ("task", "implementation"),
    [pytest.param(task, name, id=f"{task.name}-{name}") for task in TASKS.values() for name in contenders(task)],
)
def test_all_implementations_compute_the_same(task: Task, implementation: str, small: Workload) -> None:
    if reason := baselines.missing(implementation):
        pytest.skip(reason)
    if implementation == baselines.KEOPS and small.dimensions > 2:
        pytest.skip("KeOps compiles for every number of dimensions")
    # At σ² = 0.001 gradients through a transition magnify the rounding of their inputs in float32.
    limit = 2e-5 if task in TRANSITION_GRADIENTS else 1e-6
    assert baselines.relative_error(task, implementation, small) < (
        limit if implementation in baselines.BACKENDS else 1e-3
    )


def test_whole_and_in_chunks_plain_torch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "ROWS", 32)
    for task in TASKS.values():
        if not task.backward:
            assert baselines.relative_error(task, baselines.PUBLISHED, SMALL[2]) < 1e-3
    assert baselines.relative_error(SCORE, baselines.WHOLE, SMALL[2]) < 1e-3


def test_a_wrong_answer_shows_as_error(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = lambda x, refs, sigma2: torch.zeros_like(x)  # noqa: E731
    monkeypatch.setitem(baselines._OTHER_FUNCTIONS, (SCORE.name, baselines.KEOPS), zero)
    assert baselines.relative_error(SCORE, baselines.KEOPS, SMALL[0]) == 1


@pytest.mark.parametrize("implementation", [*baselines.BACKENDS, baselines.PUBLISHED])
def test_gradient_of_the_loss_is_the_same_for_all(implementation: str) -> None:
    published = implementation == baselines.PUBLISHED
    step = bench_loss.plain(TOY) if published else bench_loss.ours(implementation, TOY)
    assert bench_loss.relative_error(step, TOY) < (1e-3 if published else 1e-5)
    wrong = lambda *arguments: 1.01 * step(*arguments)  # noqa: E731
    assert bench_loss.relative_error(wrong, TOY) == pytest.approx(0.01, rel=0.1)


def test_phase_portraits_are_of_unit_size() -> None:
    x, refs = GENES[0].inputs()
    assert x is refs
    assert x.shape == (2000, 256, 2)
    assert 0.2 < x.std() < 0.5
    assert -0.2 < x.min() < 0
    assert 1 < x.max() < 1.2


def test_model_of_the_arithmetic() -> None:
    small = Workload("", groups=3, queries=5, refs=20, dimensions=7, sigma2=1.0)
    rates = 100.0, 1000.0
    evaluation = 300 * (1 / 100 + 14 / 1000)
    assert math.isclose(limits.model_seconds(SCORE, small, rates), evaluation)
    assert math.isclose(limits.model_seconds(PASS, small, rates), (5 + 5 / 20) * evaluation)
    assert math.isclose(limits.model_seconds(LOG_DENSITY, small, rates), 300 * (1 / 100 + 7 / 1000))
    # Pairs of 5 starts with 5 ends, not with the 20 reference points.
    assert math.isclose(limits.model_seconds(AVERAGE, small, rates), evaluation * (1 + 5 / 20))
    # A pass has the work of a chain of 4 evaluations, one more and a transition; its gradient 3.5 times as much.
    assert limits.work(TASKS[PASS.with_gradient().name], small) == (2 * (5 * 300 + 75), 7 * 7 * (5 * 300 + 75))


def test_live_share_counts_pairs_above_rounding() -> None:
    x = torch.tensor([[[0.0], [1.0], [100.0]]])
    assert limits.live_share(x, x, 1.0) == pytest.approx(5 / 9)
    assert limits.live_share(x, x, 1e6) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_matrices() -> None:
    (case,) = (case for case in SCALING["points N = M, D = 2"] if case.queries == 4096)
    matrix = 4 * 4096**2
    own = torch.ones(5 * matrix // 4)  # what this process holds must not count
    assert own.sum() > 0
    assert 2.5 * matrix < memory.peak_extra(SCORE, case, baselines.WHOLE) < 4 * matrix


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux alone")
def test_out_of_memory_is_reported() -> None:
    case = SCALING["points N = M, D = 2"][-1]  # a matrix of 17 GB
    with pytest.raises(memory.OutOfMemoryError, match="whole takes more than 12 GiB"):
        memory.peak_extra(SCORE, case, baselines.WHOLE)


TINY = {"name": "tiny", "groups": 1, "queries": 10, "refs": 10, "dimensions": 2, "sigma2": 1.0}


def entry(implementation: str, seconds: float, error: float, table: str = SCORE.name, **others: Any) -> dict[str, Any]:
    info = {
        "task": SCORE.name,
        "workload": TINY,
        "implementation": implementation,
        "dtype": "float32",
        "threads": 2,
        "error": error,
        "live_share": 0.5,
        "cores": 2,
        "rates": [1e3, 1e5],
    }
    return {
        "group": f"{table}: {others.pop('name', 'toy')}",
        "params": {},
        "stats": {"median": seconds},
        "extra_info": {**info, **others},
    }


def results(*entries: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "cpu": "A CPU",
        "threads": 2,
        "thread_source": "OpenMP",
        "target": "avx2",
        "system": "Linux",
        "python": "3.11",
        "torch": "2.13",
    }
    origin = Origin("2030-01-02", "0123456", machine)
    return {"machine_info": {"origin": origin.fields()}, "benchmarks": list(entries)}


FAILED = {"failed": "out of memory: whole takes more than 12 GiB"}


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    one_field = {
        "group": "controllable: one field",
        "params": {"implementation": "published"},
        "stats": {"median": 0.5},
        "extra_info": {},
    }
    run = results(
        entry("cpu", 0.208, 1e-8, memory=3_000_000),
        entry("published", 2.08, 1e-4),
        entry("keops", 0.1, 0.5),
        entry("whole", 0.0, math.nan, **FAILED),
        entry("cpu", 0.416, 1e-8, table="kde_score by threads, tiny", name="1", threads=1),
        one_field,
    )
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "2029-01-01-speed-cpu.md").write_text("old")
    (tmp_path / "2029-01-01-speed-cpu.json").write_text("{}")
    report.keep(tmp_path / "run.json", tmp_path)
    parts = report.render(tmp_path)
    assert {file.name for file in tmp_path.glob("20*")} == {
        "2030-01-02-speed-cpu.json", "2030-01-02-speed-cpu-rows.json", "2030-01-02-speed-cpu.md"
    }  # fmt: skip
    text = (tmp_path / "2030-01-02-speed-cpu.md").read_text()
    # 100 pairs at (1/1000 + 4/100000) s are half of the time; KeOps was wrong and gets no figure.
    row = "| toy | 208 ms | 2.08 s (10 ×) | out of memory | wrong | 50% / 5% / – / – | 50% | 1e-08 / 1e-04 / nan /"
    assert f"{row} 5e-01 | 3 MB |" in text
    assert "| 1 | 416 ms | 50% |" in text  # one of two threads has half of the rates
    assert "| one field | 500 ms |" in text
    for fact in ("A CPU", "2 threads (OpenMP)", "avx2", "0123456", "torch 2.13", "1e+03 exponentials"):
        assert fact in " ".join(text.split())
    shown = "| score | toy | 208 ms |  | 10 × |  | wrong |  |  | 3 MB /  | 1e-08 / 1e-04 | 50% |"
    assert shown in parts["speed"]
    assert "[All rows](results/2030-01-02-speed-cpu.md)" in parts["speed"]
    assert parts["speed"][-1] == "![Time by size](results/speed-time.png)"
    assert "2030-01-02, A CPU" in parts["speed"][0]
    (tmp_path / "2030-01-02-speed-cpu-rows.json").unlink()  # as in a checkout: git has the page's rows alone
    (tmp_path / "2030-01-02-speed-cpu.md").write_text("kept")
    assert report.render(tmp_path) == parts
    assert (tmp_path / "2030-01-02-speed-cpu.md").read_text() == "kept"


def test_no_figure_without_a_right_answer_of_ours() -> None:
    kept = speed.keep(results(entry("cpu", 0.1, math.nan), entry("published", 0.5, 1e-4)))
    assert "| toy | wrong | 500 ms | – / 21% | – |" in speed.document(kept)
    assert "| score | toy | wrong |  | 500 ms |" in "\n".join(speed.summary(kept))


def test_no_memory_of_a_wrong_answer() -> None:
    kept = speed.keep(results(entry("cpu", 0.1, 1e-8, memory=10**6), entry("keops", 0.1, 0.5, memory=10**6)))
    assert "| wrong |" in speed.document(kept)
    assert speed.document(kept).splitlines()[-1].endswith("| 1 MB |  |")


def test_half_precision_may_be_rounded_and_no_more() -> None:
    row = {"task": SCORE.name, "implementation": "cpu", "dtype": "bfloat16", "error": 2e-3}
    assert not speed.wrong(row)
    assert speed.wrong(row | {"error": 2e-2})
    assert speed.wrong(row | {"dtype": "float32"})


def test_plots_show_right_answers_alone(tmp_path: Path) -> None:
    what, cases = next(iter(SCALING.items()))
    table = f"{SCORE.name} by {what}"
    names = [case.name for case in cases[:3]]
    run = results(
        *(entry("cpu", 0.1 * k, 1e-8, table=table, name=name, memory=10**6) for k, name in enumerate(names, 1)),
        entry("keops", 0.1, 0.5, table=table, name=names[0]),
        entry("whole", 0.0, 1e-5, table=table, name=names[1], **FAILED),
    )
    kept = speed.keep(run)
    found = plots.curves(kept, what)
    assert [(size, row["seconds"]) for size, row in found["cpu"]] == [
        (256.0, 0.1), (1024.0, pytest.approx(0.2)), (4096.0, pytest.approx(0.3))
    ]  # fmt: skip
    assert "keops" not in found
    assert {path.name for path in plots.draw(tmp_path, kept)} == {
        "speed-time.png", "speed-memory.png", "speed-limit.png"
    }  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_parts_of_the_page_are_filled_by_name() -> None:
    text = f"before\n{report.begin('speed')}\nold\n{report.END}\nafter {report.END}"
    assert (
        report.fill(text, {"speed": ["new"]})
        == f"before\n{report.begin('speed')}\nnew\n{report.END}\nafter {report.END}"
    )
    with pytest.raises(ValueError, match="must have one line <!-- other"):
        report.fill(text, {"other": []})
    with pytest.raises(ValueError, match="nothing ends the part speed"):
        report.fill(report.begin("speed"), {"speed": []})


def test_the_page_shows_the_newest_results() -> None:
    page = report.PAGE.read_text()
    assert report.fill(page, report.parts()) == page, "run python -m bench.report"


def test_workloads_have_names_of_their_own() -> None:
    # bench.memory finds a workload by its name, the report a row.
    workloads = [*FAMILIES, *(workload for row in SCALING.values() for workload in row)]
    assert len({w.name for w in workloads}) == len(workloads) == len(memory.WORKLOADS)
    assert all(Workload(**{k: v for k, v in asdict(w).items() if k != "make"}).pairs == w.pairs for w in workloads)
