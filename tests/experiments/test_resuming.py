"""Runs that were interrupted, and the rule that a folder belongs to one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.experiments.walk import Walk, start


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    walk: Walk, stop_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--out", "whole") == 0
    walk.stop_at = stop_at
    assert start("--out", "parts") == 130
    assert "interrupted; run the same command to resume" in capsys.readouterr().err
    seconds = json.loads(Path("parts/config.json").read_text())["seconds"]
    with Path("parts/metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 99, "no')  # the row that a kill cut short
    assert start("--out", "parts") == 0
    assert f"resuming parts, {stop_at + 1} rows done" in capsys.readouterr().out
    assert Path("parts/metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()
    assert json.loads(Path("parts/config.json").read_text())["seconds"] > seconds


def test_interrupted_restart_is_resumed_without_restart(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    walk.stop_at = 1
    assert start("--restart") == 130
    assert "without --restart" in capsys.readouterr().err


@pytest.mark.usefixtures("walk")
def test_a_finished_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    start()
    before = Path("runs/walk-smoke/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert start() == 0
    assert "runs/walk-smoke is finished" in (printed := capsys.readouterr().out)
    assert "--restart" in printed
    assert Path("runs/walk-smoke/metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.usefixtures("walk")
def test_another_run_in_the_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    start()
    assert start("--seed", "1", "--config.lr", "0.5") == 2
    printed = capsys.readouterr().err
    assert "seed 0 there, 1 now; config.lr 0.1 there, 0.5 now" in printed
    assert "--out" in printed
    assert "--restart" in printed
    assert start("--seed", "1", "--restart") == 0


@pytest.mark.usefixtures("walk")
def test_restart_deletes_only_what_a_run_writes() -> None:
    start("--out", "mine")
    Path("mine/thesis.tex").write_text("years of work")
    Path("mine/metrics.jsonl").write_text('{"kind": "stale"}\n')
    Path("mine/models/flux").mkdir(parents=True)
    Path("mine/models/flux/last.pt").write_text("of other settings")
    assert start("--out", "mine", "--restart") == 0
    assert Path("mine/thesis.tex").read_text() == "years of work"
    assert "stale" not in Path("mine/metrics.jsonl").read_text()
    assert not Path("mine/models").exists()


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
@pytest.mark.parametrize("more", [(), ("--restart",)])
@pytest.mark.usefixtures("walk")
def test_a_foreign_folder_is_refused(name: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path("foreign").mkdir()
    Path("foreign", name).write_text('{"model_type": "gpt2"}')
    assert start("--out", "foreign", *more) == 2
    assert "foreign is not empty and holds no config.json of a run" in capsys.readouterr().err
    assert [path.name for path in Path("foreign").iterdir()] == [name]
