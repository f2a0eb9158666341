"""Every block of the README runs: Python as it stands, in a fresh interpreter, commands at their smallest."""

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import fluxkernels
import fluxmatching
from fluxmatching import recipes, training, velocity

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2


# Set-up of the block on RNA velocity: counts of cells.
CELLS = """
import anndata, numpy
mean = numpy.random.default_rng(0).gamma(2.0, 2.0, (2, 120, 1)) * numpy.ones(30)
spliced, unspliced = numpy.random.default_rng(1).poisson(mean).astype("float32")
adata = anndata.AnnData(spliced, layers={"spliced": spliced, "unspliced": unspliced})
"""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1])
def test_block_runs(block: str, tmp_path: Path) -> None:
    if "scanpy" in block:
        pytest.importorskip("scanpy", reason="scanpy is not installed: pip install 'fluxkernels[rna]'")
        block = CELLS + block
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [t for t in targets if not (README.parent / t).exists()] == []


def test_the_api_page_names_everything_public() -> None:
    page = (README.parent / "python_api" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)", row)]
    of_velocity = [n for n, v in vars(velocity).items() if not n.startswith("_") and not isinstance(v, ModuleType)]
    public = [
        n
        for n in (*fluxkernels.__all__, *fluxmatching.__all__, *recipes.__all__, *of_velocity)
        if not n.startswith("_")
    ]
    assert sorted(name for name in named if "." not in name) == sorted(public)
    for module, _, name in (name.rpartition(".") for name in named if "." in name):
        assert hasattr(importlib.import_module(module), name)
    of_training = [n for n, v in vars(training).items() if not n.startswith("_") and not isinstance(v, ModuleType)]
    assert set(of_training) <= {name.rpartition(".")[2] for name in named}


def test_the_page_of_benchmarks_lists_the_files_on_training() -> None:
    folder = README.parent / "bench"
    page = (folder / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `training/`")]
    files = [file.name for file in (folder / "training").glob("*.py") if file.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in row] == []


SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"^```\w*\n.*?^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if block.startswith("```\n")
    for line in block.splitlines()[1:-1]
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize("line", SHELL)
def test_command_works(line: str, tmp_path: Path) -> None:
    """Commands of the package run, experiments at their smallest; make and pip must have their target."""
    if line.startswith("make"):
        command = ["make", "--dry-run", "-C", str(README.parent), *line.split()[1:]]
    elif line.startswith("pip install"):
        (extras,) = re.findall(r"\[(.*)\]", line) or [""]
        known = metadata.metadata("fluxkernels").get_all("Provides-Extra") or []
        assert set(filter(None, extras.split(","))) <= set(known)
        return
    else:
        assert line.startswith("python -m ")
        command = [sys.executable, *line.split()[1:]]
    smallest = [sys.executable, "-m", "experiments", "run", "controllable", "--preset", "smoke"]
    if command[2:4] == ["experiments", "run"]:
        command = [*command[:5], "--preset", "smoke"]
    commands = [smallest, command] if command[2:4] == ["experiments", "report"] else [command]
    path = os.pathsep.join([str(README.parent), str(README.parent / "python_api"), os.environ.get("PYTHONPATH", "")])
    for each in commands:
        done = subprocess.run(
            each, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
