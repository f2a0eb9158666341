"""The experiments' command line, run folder and report, tried on an experiment of three steps."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from experiments.__main__ import locked, main
from experiments.common import figures, registry
from experiments.common.registry import Experiment, UsageError
from experiments.common.report import duration, spread
from experiments.common.run import Figure, Result, Run


@dataclass(frozen=True)
class Config:
    steps: int = 6
    lr: float = 0.1
    ema: bool = True
    label: str = "a|b"
    sigmas: tuple[float, ...] = (0.1, 0.5)
    window: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


class Walk:
    """A random walk, the state of which goes through the checkpoint. `stop_at` interrupts it once."""

    stop_at: int | None = None

    def __call__(self, run: Run) -> None:
        state = run.load_state() or {"step": 0, "x": torch.zeros(2)}
        done = {row["step"] for row in run.rows("step")}
        for step in run.bar(range(state["step"], run.config.steps), "walk"):
            x = state["x"] + run.config.lr * torch.randn(2, generator=run.generator("step", step))
            if step not in done:
                run.log(kind="step", step=step, norm=x.norm())
            if step == self.stop_at:  # after the row and before the checkpoint: the worst moment
                self.stop_at = None
                raise KeyboardInterrupt
            state = {"step": step + 1, "x": x}
            run.save_state(state)
        run.log(kind="end", norm=state["x"].norm(), label=run.config.label)
        figure, axes = figures.new_figure(3, 2)
        axes.plot([row["norm"] for row in run.rows("step")], color=figures.FLUX)
        figures.save(figure, run.figure("walk"))
        norm = run.rows("end")[0]["norm"]
        run.summary(
            [
                Result("|x| < 1e9", f"{norm:.3f}", "1.0", norm < 1e9),
                Result("impossible <b>", f"{norm:.3f}", "-1", norm < 0),
                Result("steps", str(run.config.steps)),
            ],
            [Figure(run.figure("walk"), "A walk [of 2-D].")],
            ["A note."],
        )


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Walk:
    walk = Walk()
    presets = {"smoke": Config(), "small": Config(steps=20), "paper": Config(steps=100)}
    module = ModuleType("experiments.walk")
    module.EXPERIMENT = Experiment(  # type: ignore[attr-defined]
        "walk", "A random walk", "Sec. 0", "It must stay finite.", presets, walk
    )
    monkeypatch.setitem(sys.modules, "experiments.walk", module)
    monkeypatch.setattr(registry, "NAMES", ("walk",))
    monkeypatch.chdir(tmp_path)
    return walk


@pytest.fixture
def job(walk: Walk) -> Run:
    return make_run(walk)


def make_run(walk: Walk, seed: int = 0) -> Run:
    experiment = registry.load_experiment("walk")
    return Run(experiment, "smoke", Config(), "torch", torch.device("cpu"), seed, Path("out"), progress=False)


def start(*more: str) -> int:
    return main(["run", "walk", "--preset", "smoke", "--backend", "torch", "--device", "cpu", "--quiet", *more])


# ---------------------------------------------------------------- command line


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


# ---------------------------------------------------------------- --set


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


# ---------------------------------------------------------------- resuming, and the rule of the folder


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    walk: Walk, stop_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--out", "whole") == 0
    walk.stop_at = stop_at
    assert start("--out", "parts") == 130
    assert "interrupted; run the same command to resume" in capsys.readouterr().err
    seconds = json.loads(Path("parts/config.json").read_text())["seconds"]
    with Path("parts/metrics.csv").open("a") as file:
        file.write("step,99,0.1")  # the row that a kill cut short
    assert start("--out", "parts") == 0
    assert f"resuming parts, {stop_at + 1} rows done" in capsys.readouterr().out
    assert Path("parts/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    assert json.loads(Path("parts/config.json").read_text())["seconds"] > seconds


def test_interrupted_restart_is_resumed_without_restart(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    walk.stop_at = 1
    assert start("--restart") == 130
    assert "without --restart" in capsys.readouterr().err


@pytest.mark.usefixtures("walk")
def test_a_finished_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    start()
    before = Path("runs/walk-smoke/metrics.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert start() == 0
    assert "runs/walk-smoke is finished" in (said := capsys.readouterr().out)
    assert "--restart" in said
    assert Path("runs/walk-smoke/metrics.csv").stat().st_mtime_ns == before


@pytest.mark.usefixtures("walk")
def test_another_run_in_the_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    start()
    assert start("--seed", "1", "--set", "lr=0.5") == 2
    said = capsys.readouterr().err
    assert "seed 0 there, 1 now; config.lr 0.1 there, 0.5 now" in said
    assert "--out" in said
    assert "--restart" in said
    assert start("--seed", "1", "--restart") == 0


@pytest.mark.usefixtures("walk")
def test_restart_deletes_only_what_a_run_writes() -> None:
    start("--out", "mine")
    Path("mine/thesis.tex").write_text("years of work")
    Path("mine/metrics.csv").write_text("kind\nstale\n")
    Path("mine/models/flux").mkdir(parents=True)
    Path("mine/models/flux/last.pt").write_text("of other settings")
    assert start("--out", "mine", "--restart") == 0
    assert Path("mine/thesis.tex").read_text() == "years of work"
    assert "stale" not in Path("mine/metrics.csv").read_text()
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


# ---------------------------------------------------------------- what a run offers


def test_metrics_round_trip(job: Run, walk: Walk) -> None:
    job.log(kind="a", step=3, loss=0.1 + 0.2, text='comma, "quote"')
    job.log(kind="b", tensor=torch.tensor(2.5), number=np.float64(1e-300), flag=np.bool_(True))
    job.log(kind="a", step=np.int64(-4), loss=float("nan"), text="1_000", nothing=None)
    job.log(loss=float("-inf"), big=10**30)
    for run in (job, make_run(walk)):  # as written, and as read by a later process
        first, second, third, fourth = run.rows()
        assert first == {"kind": "a", "step": 3, "loss": 0.1 + 0.2, "text": 'comma, "quote"'}
        assert second == {"kind": "b", "tensor": 2.5, "number": 1e-300, "flag": 1}
        assert np.isnan(third.pop("loss"))
        assert third == {"kind": "a", "step": -4, "text": "1_000"}
        assert fourth == {"loss": float("-inf"), "big": 10**30}
        assert isinstance(first["step"], int)
        assert run.rows("b") == [second]
        assert run.rows("c") == []


def test_metrics_refuse_what_would_not_come_back(job: Run) -> None:
    with pytest.raises(ValueError, match="x: cannot log text with a line break"):
        job.log(x="a\nb")
    with pytest.raises(TypeError, match="x: cannot log a Tensor"):
        job.log(x=torch.zeros(2))
    assert job.rows() == []


def test_a_cut_header_is_as_good_as_none(job: Run, walk: Walk) -> None:
    Path("out/metrics.csv").write_text("kind,st")
    again = make_run(walk)
    assert again.rows() == []
    again.log(kind="a")
    assert again.rows() == [{"kind": "a"}]


def test_state_round_trip(job: Run) -> None:
    assert job.load_state() is None
    job.save_state({"step": 3, "x": torch.arange(3)})
    state = job.load_state()
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["x"], torch.arange(3))
    assert not Path("out/checkpoint.pt.tmp").exists()


def test_generator_depends_on_seed_and_key_alone(job: Run, walk: Walk) -> None:
    assert job.generator("step", 3).initial_seed() == 7027700526764347410
    assert job.generator("step", np.int64(3)).initial_seed() == 7027700526764347410
    seeds = {job.generator(*key).initial_seed() for key in ((), (1,), ("1",), (1, 1), (11,), ("step", 3))}
    seeds.add(make_run(walk, seed=1).generator("step", 3).initial_seed())
    assert len(seeds) == 7
    with pytest.raises(TypeError):
        job.generator(0.5)  # type: ignore[arg-type]


def test_bar_counts_and_is_quiet(job: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(job.bar("abc", "letters")) == ["a", "b", "c"]
    with job.bar(3, "steps") as bar:
        bar.update(3)
        bar.set_postfix(loss=1.0)
    assert capsys.readouterr().err == ""
    job.progress = True
    assert list(job.bar([1, 2], "numbers")) == [1, 2]
    assert "numbers: 100%" in capsys.readouterr().err


def test_summary_refuses_a_figure_from_elsewhere(job: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="elsewhere"):
        job.summary([], [Figure(tmp_path / "elsewhere.png", "")])


def test_figures_not_captioned_are_shown_last(job: Run) -> None:
    first, second = job.figure("first"), job.figure("second")
    job.figure("first")
    job.summary([], [Figure(second, "Second.")])
    assert job.figures == [second, first]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.7, "1 min 00 s"), (3599.2, "59 min 59 s"), (3900, "1 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_peak_memory_is_that_of_the_process() -> None:
    code = """
import torch
from experiments.common.report import peak_memory
before = float(peak_memory(torch.device("cpu")).removesuffix(" GB"))  # may be that of the process that started this one
held = torch.ones(int((before + 0.5) * 1e9) // 4)
print(before, peak_memory(torch.device("cpu")).removesuffix(" GB"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.45 <= after - before <= 1.5  # what is held, and PyTorch itself


def test_spread_of_values_that_are_not_all_finite() -> None:
    assert spread([1.0, 2.0]) == "1.500 ± 0.707"
    assert spread([1.0, float("inf")]) == "inf"
    assert spread([1.0]) == "1.000"


# ---------------------------------------------------------------- report


def test_report_is_one_self_contained_page(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    start("--out", "runs/deep/seed 1", "--seed", "1")
    Path("runs/deep/seed 1/figures/walk.png").unlink()
    walk.stop_at = 2
    start("--out", "runs/begun")
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text("[]")
    summary = Path("runs/walk-smoke/summary.md")
    summary.write_text(summary.read_text() + "\n<script>alert(1)</script>\n")
    capsys.readouterr()

    assert main(["report"]) == 0
    assert capsys.readouterr().out == "runs/report.html: 2 finished, 1 unfinished\n"
    page = Path("runs/report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert [source[:22] for source in sources] == ["data:,", "data:image/png;base64,"]
    assert not re.search(r"<(script|link|iframe)", page)
    assert not re.search(r"https?://", page)
    assert "prefers-color-scheme: dark" in page
    row = r'<tr><td><a href="#run1">walk</a></td><td>smoke</td><td>torch</td><td>1/2</td><td>\d+ s</td>'
    assert re.search(row + r"<td>\d{4}-\d\d-\d\d</td></tr>", page)
    assert '<section id="run1">\n<h2>A random walk</h2>' in page
    assert "<td>begun</td><td>walk</td><td>smoke</td><td>torch</td>" in page
    assert "|x| &lt; 1e9" in page
    assert "<td>impossible &lt;b&gt;</td>" in page


@pytest.mark.usefixtures("walk")
def test_report_elsewhere() -> None:
    start("--out", "results/a")
    assert main(["report", "--runs", "results", "--out", "pages/all.html"]) == 0
    assert "A random walk" in Path("pages/all.html").read_text()
