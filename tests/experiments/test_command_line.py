"""The command line of the experiments, and the rule that a folder belongs to one run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.common import registry
from experiments.common.folder import locked
from experiments.common.options import read_options
from experiments.common.registry import Experiment
from tests.experiments.walk import Config, start


@pytest.mark.usefixtures("walk")
def test_list_shows_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "paper", "presets", "title"]
    assert line.split("  ") == ["walk", "Sec. 0", "smoke, small, paper", "A random walk"]


@pytest.mark.usefixtures("walk")
def test_one_run_per_folder_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
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
def test_run_writes_its_folder_and_shows_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--config.lr", "0.25", "--config.sigmas", "1", "2") == 0
    out = Path("runs/walk-smoke")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {
        ".lock", "config.json", "metrics.jsonl", "checkpoint.pt", "summary.md", "summary.json", "figures/walk.png",
    }  # fmt: skip

    printed = capsys.readouterr().out
    assert "NOT REPRODUCED: impossible <b>" in printed
    assert "runs/walk-smoke/summary.md" in printed
    assert "runs/walk-smoke/figures/walk.png" in printed

    summary = (out / "summary.md").read_text()
    assert re.search(r"^\| \\\|x\\\| < 1e9 \| 1\.0 \| \d\.\d+ \| yes \|$", summary, re.M)
    assert re.search(r"^\| impossible <b> \| -1 \| \d\.\d+ \| NO \|$", summary, re.M)
    assert "| steps | – | 6 |  |" in summary
    assert "![walk](figures/walk.png)\n\nA walk [of 2-D]." in summary
    command = "run walk --preset smoke --backend torch --device cpu --seed 0 --config.lr 0.25 --config.sigmas 1.0 2.0"
    assert f"python -m experiments {command}\n" in summary

    config = json.loads((out / "config.json").read_text())
    assert config["config"]["sigmas"] == [1.0, 2.0]
    assert config["backend"] == {"requested": "torch", "resolved": "torch"}
    for path in (out / "config.json", out / "summary.md", out / "summary.json", out / "metrics.jsonl"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.usefixtures("walk")
def test_the_command_in_the_summary_makes_the_same_run() -> None:
    changes = ("--config.no-ema", "--config.label=-x y", "--config.window", "3", "-4", "--config.sigmas")
    start(*changes, "--out", "first")
    command = re.search(r"^python -m experiments (.+)$", Path("first/summary.md").read_text(), re.M)
    assert command
    assert main(shlex.split(command[1])) == 0
    first, again = (json.loads(Path(f, "config.json").read_text()) for f in ("first", "runs/walk-smoke"))
    assert first["config"] == again["config"]
    assert Path("first/metrics.jsonl").read_bytes() == Path("runs/walk-smoke/metrics.jsonl").read_bytes()


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
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {text}")
    assert printed.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nope"], "Unrecognized options: nope"),
        (["report", "--nope"], "Unrecognized options: --nope"),
        ([], "Expected one of {list, run, report, export}."),
    ],
)
def test_mistakes_before_an_experiment_is_named(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_without_its_packages_it_names_the_extra() -> None:
    program = "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('experiments', run_name='__main__')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: the experiments need more packages: pip install -e '.[experiments]'\n"


def test_unknown_name_in_a_process_of_its_own() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments", "run", "nope"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no experiment 'nope'; there are ")
    assert " controllable, " in done.stderr
    assert "Traceback" not in done.stderr


def read(*words: str) -> Config:
    config: Config = read_options(["walk", *words]).config
    return config


@pytest.mark.usefixtures("walk")
def test_overrides_are_read_as_the_fields_type() -> None:
    words = ["--config.lr", "1e-3", "--config.no_ema", "--config.label", "x=y", "--config.sigmas", "1"]
    config = read("--preset", "paper", *words, "--config.window", "5", "-6", "--config.steps=4")
    assert config == Config(4, 1e-3, False, "x=y", (1.0,), (5, -6))
    assert [type(value) for value in (config.steps, config.lr, config.sigmas[0])] == [int, float, float]
    assert read() == Config(steps=20)
    assert read("--preset", "smoke") == Config()
    assert read("--config.sigmas").sigmas == ()


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(4, 1e-3, False, "x=y", (1.0,), (5, -6)),
        Config(label="-x y", sigmas=()),
        Config(label="", lr=float("inf"), sigmas=(1e-30, 0.1 + 0.2)),
    ],
)
@pytest.mark.usefixtures("walk")
def test_overrides_of_a_config_are_the_words_that_make_it(config: Config) -> None:
    words = registry.load_experiment("walk").overrides("paper", config)
    assert read("--preset", "paper", *words) == config
    assert registry.load_experiment("walk").overrides("smoke", Config()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--config.stepz", "3"], "Unrecognized options: --config.stepz, 3; Perhaps you meant: --config.steps INT"),
        (["--config.steps", "1.5"], "Error parsing --config.steps: invalid literal for int() with base 10: '1.5'"),
        (["--config.lr", "fast"], "Error parsing --config.lr: could not convert string to float: 'fast'"),
        (["--config.ema", "1"], "Unrecognized options: 1"),
        (["--config.window", "1", "2", "3"], "Unrecognized options: 3"),
        (["--config.window", "1"], "Missing value for argument '--config.window'. Expected 2 values."),
        (["--config.sigmas", "1", "x"], "Error parsing --config.sigmas: "),
        (["--config.label", "/home/me"], "--config.label got an absolute path; give it relative"),
        (["--config.steps", "0"], "Error parsing config: steps must be at least 1"),
        (["--preset", "gpu"], "walk has no preset 'gpu'; there are smoke, small, paper"),
        (["--preset", "large"], "invalid choice 'large' for argument '--preset'."),
        (["--seed", "x"], "Error parsing --seed: "),
    ],
)
@pytest.mark.usefixtures("walk")
def test_bad_options_are_one_line_and_exit_2(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "walk", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {text}")
    assert printed.err.count("\n") == 1
    assert not re.search("[│─╭╰]", printed.err)
    assert printed.out == ""
    assert not Path("runs").exists()


@pytest.mark.usefixtures("walk")
def test_help_lists_the_fields_of_the_preset_with_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "walk", "--preset", "paper", "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--config.steps INT how many steps (default: 100)" in printed
    assert "--config.sigmas [FLOAT [FLOAT ...]] noise levels (default: 0.1 0.5)" in printed
    assert "--config.ema, --config.no_ema" in printed
    assert "--restart" in printed


@pytest.mark.usefixtures("walk")
def test_help_without_a_name_shows_the_common_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--preset {smoke,small,gpu,paper}" in printed
    assert "--config" not in printed
    assert main(["run"]) == 2
    assert re.match("error: Missing from python -m experiments run: NAME", capsys.readouterr().err)


def test_experiment_checks_its_presets() -> None:
    def make(**presets: object) -> Experiment:
        return Experiment("x", "", "", "", presets, lambda run: None)

    with pytest.raises(ValueError, match="presets must be smoke, small, paper"):
        make(smoke=Config(), small=Config())
    with pytest.raises(ValueError, match="one frozen dataclass"):
        make(smoke=Config(), small=Config(), paper=3)
    with pytest.raises(ValueError, match="one frozen dataclass"):
        make(smoke=1, small=2, paper=3)
