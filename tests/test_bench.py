"""The peers of the benchmarks compute what we compute, and the report says what was measured."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_controllable as case
from bench import limits, memory, peers, report
from bench.cases import CASES, GENES, SINGLE, Case
from experiments.controllable.metrics import flux_losses


def ours(family: case.Family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return flux_losses(case.make_controls(), case.THETA, family, case.BATCH, case.MINIBATCHES, generator, "torch")


def test_controllable_peer_has_the_same_loss() -> None:
    torch.manual_seed(2)
    controls = case.make_controls()
    a, b = ours("violating"), case.published_losses(controls, "violating")
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * error
    assert a.mean() > 2 * error
    scale = a.abs().mean()
    assert ours("preserving").abs().max() < 1e-8 * scale
    assert case.published_losses(controls, "preserving").abs().max() < 1e-6 * scale


SMALL = [replace(GENES[0], groups=3, points=40), replace(GENES[1], groups=3, points=40), replace(SINGLE[0], points=70)]


def relative_error(op: str, who: str, small: Case) -> float:
    x = small.inputs().to(peers.dtype(op, who))
    return peers.relative_error(op, who, x, small.sigma2, peers.function(op, who)(x, x, small.sigma2))


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
@pytest.mark.parametrize(("op", "who"), [(op, who) for op in CASES for who in (*peers.BACKENDS, *peers.PEERS[op])])
def test_everybody_computes_the_same(op: str, who: str, small: Case) -> None:
    if reason := peers.missing(who):
        pytest.skip(reason)
    assert relative_error(op, who, small) < (1e-6 if who in peers.BACKENDS else 1e-3)


def test_plain_torch_in_chunks_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROWS", 32)
    for op in CASES:
        assert relative_error(op, "published", SMALL[-1]) < 1e-3


def test_a_wrong_answer_shows_as_error() -> None:
    x = SMALL[0].inputs()
    assert peers.relative_error(peers.SCORE, "cpu", x, SMALL[0].sigma2, torch.zeros_like(x)) == 1


def test_phase_portraits_are_of_unit_size() -> None:
    x = GENES[0].inputs()
    assert x.shape == (2000, 256, 2)
    assert 0.2 < x.std() < 0.5
    assert -0.2 < x.min() < 0
    assert 1 < x.max() < 1.2


def test_model_of_the_arithmetic() -> None:
    small = Case("", groups=3, points=10, dimensions=7, sigma2=1.0)
    rates = 100.0, 1000.0
    evaluation = 300 * (1 / 100 + 14 / 1000)
    assert math.isclose(limits.model_seconds(peers.SCORE, small, rates), evaluation)
    assert math.isclose(limits.model_seconds(peers.PASS, small, rates), 6 * evaluation)
    assert math.isclose(limits.model_seconds(peers.LOG_DENSITY, small, rates), 300 * (1 / 100 + 7 / 1000))


def test_live_share_counts_pairs_above_rounding() -> None:
    x = torch.tensor([[[0.0], [1.0], [100.0]]])
    assert limits.live_share(x, 1.0) == pytest.approx(5 / 9)
    assert limits.live_share(x, 1e6) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_matrices() -> None:
    matrix = 4 * 4096**2
    own = torch.ones(5 * matrix // 4)  # what this process holds must not count
    assert own.sum() > 0
    assert 2.5 * matrix < memory.peak_extra(peers.SCORE, SINGLE[0], "published") < 4 * matrix


def entry(who: str, seconds: float, error: float, **others: Any) -> dict[str, Any]:
    info = {
        "op": peers.SCORE,
        "case": ["tiny", 1, 10, 2, 1.0],
        "who": who,
        "error": error,
        "live_share": 0.5,
        "cores": 2,
        "rates": [1e3, 1e5],
    }
    return {
        "group": f"{peers.SCORE}: tiny",
        "params": {},
        "stats": {"median": seconds},
        "extra_info": {**info, **others},
    }


def results(*entries: dict[str, Any]) -> dict[str, Any]:
    ours = {"torch": "2.13", "threads": 2, "target": "avx2", "thread_source": "OpenMP"}
    machine = {"cpu": {"brand_raw": "A CPU"}, "system": "Linux", "python_version": "3.11", "fluxkernels": ours}
    commit = {"id": "0123456789", "dirty": False}
    return {
        "machine_info": machine,
        "commit_info": commit,
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": list(entries),
    }


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controllable = {
        "group": "controllable: one field",
        "params": {"who": "published"},
        "stats": {"median": 0.5},
        "extra_info": {},
    }
    run = results(
        entry("cpu", 0.208, 1e-8, memory=3_000_000),
        entry("published", 2.08, 1e-4),
        entry("keops", 0.1, 0.5),
        controllable,
    )
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "2029-01-01-speed-cpu.md").write_text("old")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "run.json"), "--output", str(tmp_path)])
    report.main()
    (written,) = tmp_path.glob("*.md")
    assert written.name == "2030-01-02-speed-cpu.md"
    text = written.read_text()
    assert (
        "| case | cpu | plain torch | KeOps | limit | live | error: cpu / plain torch / KeOps | memory: cpu |" in text
    )
    # 100 pairs at (1/1000 + 4/100000) s are half of the time; KeOps was wrong and gets no figure.
    assert "| tiny | 208 ms | 2.08 s (10 ×) | wrong | 50% | 50% | 1e-08 / 1e-04 / 5e-01 | 3 MB |" in text
    assert "| one field | 500 ms |" in text
    for fact in ("A CPU", "2 threads (OpenMP)", "avx2", "0123456", "torch 2.13", "1e+03 exponentials"):
        assert fact in " ".join(text.split())


def test_no_figure_without_a_right_answer_of_ours() -> None:
    text = report.report(results(entry("cpu", 0.1, math.nan), entry("published", 0.5, 1e-4)))
    assert "| tiny | wrong | 500 ms | – | – |" in text


def test_cases_have_names_of_their_own() -> None:
    # bench.memory finds a case by its name, the report a row.
    for cases in CASES.values():
        assert len({c.name for c in cases}) == len(cases)
