"""A run: rows, states, generators, a summary; and the report of all runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.__main__ import main
from experiments.common.results import Figure, Result, duration, spread
from experiments.common.run import Run
from tests.experiments.walk import Walk, make_run, start


def test_metrics_round_trip(job: Run, walk: Walk) -> None:
    job.log(kind="a", step=3, loss=0.1 + 0.2, text='comma, "quote"')
    job.log(kind="b", tensor=torch.tensor(2.5), number=np.float64(1e-300), flag=np.bool_(True))
    job.log(kind="a", step=np.int64(-4), loss=float("nan"), text="1_000", nothing=None)
    job.log(loss=float("-inf"), big=10**30)
    job.log(text="a\nb – ∞", whole=3.0, digits="3", yes="true")
    for run in (job, make_run(walk)):  # as written, and as read by a later process
        first, second, third, fourth, fifth = run.rows()
        assert first == {"kind": "a", "step": 3, "loss": 0.1 + 0.2, "text": 'comma, "quote"'}
        assert second == {"kind": "b", "tensor": 2.5, "number": 1e-300, "flag": True}
        assert np.isnan(third.pop("loss"))
        assert third == {"kind": "a", "step": -4, "text": "1_000", "nothing": None}
        assert fourth == {"loss": float("-inf"), "big": 10**30}
        assert fifth == {"text": "a\nb – ∞", "whole": 3.0, "digits": "3", "yes": "true"}
        types = [type(value) for value in (first["step"], second["flag"], fifth["whole"], fifth["digits"])]
        assert types == [int, bool, float, str]
        assert run.rows("b") == [second]
        assert run.rows("c") == []


def test_metrics_refuse_what_would_not_come_back(job: Run) -> None:
    for value, name in ((torch.zeros(2), "Tensor"), ([1, 2], "list"), (Path("a"), "PosixPath")):
        with pytest.raises(TypeError, match=f"x: cannot log a {name}"):
            job.log(x=value)
    assert job.rows() == []


@pytest.mark.parametrize("whole", ["", '{"kind": "a", "x": 1}\n'])
@pytest.mark.parametrize("cut", [b"{", b'{"kind": "a", "x', '{"kind": "–'.encode()[:-1], b'{"kind": "a"}'])
def test_a_line_cut_short_is_dropped_at_the_next_start(job: Run, walk: Walk, whole: str, cut: bytes) -> None:
    assert job.rows() == []
    Path("out/metrics.jsonl").write_bytes(whole.encode() + cut)
    again = make_run(walk)
    kept = [{"kind": "a", "x": 1}] if whole else []
    assert again.rows() == kept
    again.log(kind="b", flag=False)
    assert again.rows() == [*kept, {"kind": "b", "flag": False}]


def test_by_seed_leaves_out_rows_without_a_value(job: Run) -> None:
    job.log(kind="a", seed=1, way="x", loss=0.5)
    job.log(kind="a", seed=0, way="x", loss=1.5)
    job.log(kind="a", seed=2, way="x", loss=None)
    job.log(kind="a", seed=3, way="x")
    job.log(kind="a", seed=4, way="y", loss=2.5)
    assert job.by_seed("a", "loss", way="x") == [1.5, 0.5]


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


def test_summary_json_holds_the_results_as_data(job: Run) -> None:
    results = [Result("a", "1", "2", np.bool_(True)), Result("b", "1", passed=False), Result("c", "1")]
    job.summary(results, [Figure(job.figure("one"), "One.")], ["A note."])
    content = json.loads(Path("out/summary.json").read_text())
    assert content["results"] == [
        {"quantity": "a", "paper": "2", "ours": "1", "holds": True},
        {"quantity": "b", "paper": "–", "ours": "1", "holds": False},
        {"quantity": "c", "paper": "–", "ours": "1", "holds": None},
    ]
    assert content["figures"] == [{"path": "figures/one.png", "caption": "One."}]
    assert content["notes"] == ["A note."]
    assert (content["title"], content["paper"]) == ("A random walk", "Sec. 0")
    assert content["command"].startswith("python -m experiments run walk --preset smoke ")
    made = content["entries"]
    assert (made["experiment"], made["preset"], made["backend"], made["seed"]) == ("walk", "smoke", "torch", "0")
    assert {"device", "duration", "peak memory", "versions", "date"} <= set(made)
    for name, value in made.items():
        assert f"| {name} | {value} |" in Path("out/summary.md").read_text()


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
from experiments.common.summary import peak_memory
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


def test_report_is_one_self_contained_page(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    start("--out", "runs/deep/seed 1", "--seed", "1")
    Path("runs/deep/seed 1/figures/walk.png").unlink()
    walk.stop_at = 2
    start("--out", "runs/begun")
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text("[]")
    foreign = Path("runs/foreign/summary.json")
    foreign.parent.mkdir()
    foreign.write_text('{"title": "of some other program"}')
    summary = Path("runs/walk-smoke/summary.json")
    content = json.loads(summary.read_text())
    content["figures"][0]["caption"] = "<script>alert(1)</script> and `metrics.jsonl`"
    content["figures"].append({"path": "../deep/secret.png", "caption": ""})
    Path("runs/deep/secret.png").write_text("of another folder")
    summary.write_text(json.dumps(content))
    Path("runs/walk-smoke/summary.md").unlink()  # the page does not need it
    capsys.readouterr()

    assert main(["report"]) == 0
    assert capsys.readouterr().out == "runs/report.html: 2 finished, 1 unfinished\n"
    page = Path("runs/report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert [source[:22] for source in sources] == ["data:,", "data:image/png;base64,", "data:,"]
    assert not re.search(r"<(script|link|iframe)", page)
    assert not re.search(r"https?://", page)
    assert "prefers-color-scheme: dark" in page
    row = r'<tr><td><a href="#run1">walk</a></td><td>smoke</td><td>torch</td><td>1/2</td><td>\d+ s</td>'
    assert re.search(row + r"<td>\d{4}-\d\d-\d\d</td></tr>", page)
    assert '<section id="run1">\n<h2>A random walk</h2>' in page
    assert "<td>begun</td><td>walk</td><td>smoke</td><td>torch</td>" in page
    assert re.search(r"<td>\|x\| &lt; 1e9</td><td>1.0</td><td>\d\.\d+</td><td>yes</td>", page)
    assert re.search(r"<td>impossible &lt;b&gt;</td><td>-1</td><td>\d\.\d+</td><td>NO</td>", page)
    assert "<p>&lt;script&gt;alert(1)&lt;/script&gt; and <code>metrics.jsonl</code></p>" in page
    assert "<pre>python -m experiments run walk --preset smoke --backend torch --device cpu --seed 1</pre>" in page
    assert page.count("<li>A note.</li>") == 2
    assert "some other program" not in page


@pytest.mark.usefixtures("walk")
def test_report_elsewhere() -> None:
    start("--out", "results/a")
    assert main(["report", "--runs", "results", "--out", "pages/all.html"]) == 0
    assert "A random walk" in Path("pages/all.html").read_text()
