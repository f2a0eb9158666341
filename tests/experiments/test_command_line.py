"""The experiments' command line and the rule of the folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import locked, main
from experiments.common import registry
from experiments.common.registry import Experiment, UsageError
from tests.experiments.walk import Config, Walk, start


@pytest.mark.usefixtures("walk")
def test_list_shows_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "paper", "presets", "title"]
    assert line.split("  ") == ["walk", "Sec. 0", "smoke, small, paper", "A random walk"]


@pytest.mark.usefixtures("walk")
def test_one_run_a_folder_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    for restart in ((), ("--restart",)):
        with locked(Path("runs/walk-smoke")):
            assert start(*restart) == 2
        assert "another run is writing to runs/walk-smoke" in capsys.readouterr().err
    assert start() == 0
    with locked(Path("runs/walk-smoke")):
        assert start("--restart") == 2
    assert Path("runs/walk-smoke/summary.md").exists()


@pytest.mark.usefixtures("walk")
def test_folders_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert start("--out", "file/below") == 2
    assert "cannot write to file/below" in capsys.readouterr().err
    assert start() == 0
    assert main(["report", "--out", "runs"]) == 2
    assert "cannot write runs" in capsys.readouterr().err


@pytest.mark.usefixtures("walk")
def test_run_writes_its_folder_and_tells_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--set", "lr=0.25", "--set", "sigmas=1,2") == 0
    out = Path("runs/walk-smoke")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {".lock", "config.json", "metrics.csv", "checkpoint.pt", "summary.md", "figures/walk.png"}

    said = capsys.readouterr().out
    assert "NOT REPRODUCED: impossible <b>" in said
    assert "runs/walk-smoke/summary.md" in said
    assert "runs/walk-smoke/figures/walk.png" in said

    summary = (out / "summary.md").read_text()
    assert re.search(r"^\| \\\|x\\\| < 1e9 \| 1\.0 \| \d\.\d+ \| yes \|$", summary, re.M)
    assert re.search(r"^\| impossible <b> \| -1 \| \d\.\d+ \| NO \|$", summary, re.M)
    assert "| steps | – | 6 |  |" in summary
    assert "![walk](figures/walk.png)\n\nA walk [of 2-D]." in summary
    command = "run walk --preset smoke --backend torch --device cpu --seed 0 --set lr=0.25 sigmas=1.0,2.0"
    assert f"python -m experiments {command}\n" in summary

    config = json.loads((out / "config.json").read_text())
    assert config["config"]["sigmas"] == [1.0, 2.0]
    assert config["backend"] == {"asked": "torch", "resolved": "torch"}
    for path in (out / "config.json", out / "summary.md", out / "metrics.csv"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.usefixtures("walk")
def test_the_command_in_the_summary_makes_the_same_run() -> None:
    start("--set", "ema=false", "label=x y", "window=3,4", "--out", "first")
    command = re.search(r"^python -m experiments (.+)$", Path("first/summary.md").read_text(), re.M)
    assert command
    assert main(shlex.split(command[1])) == 0
    first, again = (json.loads(Path(f, "config.json").read_text()) for f in ("first", "runs/walk-smoke"))
    assert first["config"] == again["config"]
    assert Path("first/metrics.csv").read_bytes() == Path("runs/walk-smoke/metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "nope"], "no experiment 'nope'; there are walk"),
        (["run", "walk", "--backend", "nope"], "no backend 'nope'; there are auto, torch, cpu, triton"),
        (["run", "walk", "--device", "nope"], "no device 'nope'"),
        (["run", "walk", "--device", "meta"], "no device 'meta'"),
        (["run", "walk", "--backend", "triton", "--device", "cpu"], "--backend triton on cpu: "),
        (["report"], "no runs below runs"),
    ],
)
@pytest.mark.usefixtures("walk")
def test_mistakes_are_one_line_and_exit_2(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {text}")
    assert said.count("\n") == 1
    assert not Path("runs").exists()


def test_unknown_name_in_a_process_of_its_own() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments", "run", "nope"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no experiment 'nope'; there are controllable, ")
    assert "Traceback" not in done.stderr


def test_overrides_are_read_as_the_fields_type(walk: Walk) -> None:
    experiment = registry.load_experiment("walk")
    words = ["steps=3", "lr=1e-3", "ema=False", "label=x=y", "sigmas=1,", "window=5, 6", "steps=4"]
    config = experiment.configure("paper", words)
    assert config == Config(4, 1e-3, False, "x=y", (1.0,), (5, 6))
    assert experiment.configure("paper", experiment.overrides("paper", config)) == config
    assert experiment.configure("smoke", ["sigmas="]).sigmas == ()
    assert experiment.overrides("smoke", Config()) == []


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("steps", "write key=value"),
        ("stepz=3", "no field 'stepz'"),
        ("steps=1.5", "steps takes int, got '1.5'"),
        ("lr=fast", "lr takes float, got 'fast'"),
        ("ema=1", "ema takes bool, got '1' for true or false"),
        ("window=1,2,3", "window takes tuple[int, int], got 3 values for 2"),
        ("sigmas=1,x", "sigmas takes tuple[float, ...], got 'x'"),
        ("label=/home/me", "label takes str, got an absolute path"),
        ("steps=0", "steps must be at least 1"),
    ],
)
def test_bad_overrides_say_what_is_taken(walk: Walk, override: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)) as caught:
        registry.load_experiment("walk").configure("smoke", [override])
    if override != "steps=0":
        assert "fields: steps (int), lr (float), ema (bool), label (str)," in str(caught.value)


def test_experiment_checks_its_presets() -> None:
    def make(**presets: object) -> Experiment:
        return Experiment("x", "", "", "", presets, lambda run: None)

    with pytest.raises(ValueError, match="presets must be smoke, small, paper"):
        make(smoke=Config(), small=Config())
    with pytest.raises(ValueError, match="one frozen dataclass"):
        make(smoke=Config(), small=Config(), paper=3)
    with pytest.raises(ValueError, match="one frozen dataclass"):
        make(smoke=1, small=2, paper=3)
