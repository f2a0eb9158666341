"""The examples of python_api/examples run as they are, one per engine."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, environment

EXAMPLES = ROOT / "python_api" / "examples"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train_plain", "standard deviation of the samples"),
        ("train_fabric", "loss"),
        ("train_lightning", "loss"),
        ("train_accelerate", "loss"),
        ("train_trainer", "100 iterations, 1 processes"),
        ("train_diffusers", "images (2, 8, 8, 1) from"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_example_trains(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"train_trainer": ["--folder", str(tmp_path)], "train_diffusers": [str(tmp_path)]}.get(name, [])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"), [("train_ddp", "2 processes"), ("train_trainer", "100 iterations, 2 processes")]
)
def test_an_example_trains_under_torchrun(name: str, said: str, tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path), "--accelerator", "cpu"] if name == "train_trainer" else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "tests.programs.process", str(EXAMPLES / f"{name}.py"), *arguments],
        env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout


def test_the_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"[{file.name}]({file.name})" in page for file in EXAMPLES.glob("train_*.py"))
