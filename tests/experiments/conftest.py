"""The experiment of `walk.py`, in place of all others; finished runs, and runs without the slow part of drawing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure

from experiments.common import registry
from experiments.common.registry import Experiment
from experiments.common.run import Run
from tests.experiments.walk import Config, Walk, make_run


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Walk:
    walk = Walk()
    presets = {"smoke": Config(), "small": Config(steps=20), "paper": Config(steps=100)}
    module = ModuleType("experiments.walk")
    module.EXPERIMENT = Experiment(  # type: ignore[attr-defined]
        "walk", "A random walk", "Sec. 0", "It must stay finite.", presets, walk
    )
    monkeypatch.setitem(sys.modules, "experiments.walk", module)
    monkeypatch.setattr(registry, "experiment_names", lambda: ("walk",))
    monkeypatch.chdir(tmp_path)
    return walk


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and not written: a second per figure, for tests of other things."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the test module's `make_run`, with the changes `FINISHED` if it has them."""
    module: Any = request.module
    run: Run = module.make_run(tmp_path_factory.mktemp("finished"), **getattr(module, "FINISHED", {}))
    run.experiment.main(run)
    return run


@pytest.fixture
def copied(request: pytest.FixtureRequest, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the finished run, of which nothing is drawn again."""
    monkeypatch.setattr(sys.modules[finished.experiment.main.__module__], "draw", lambda *_: [])
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    run: Run = request.module.make_run(tmp_path)
    return run


@pytest.fixture
def job(walk: Walk) -> Run:
    return make_run(walk)
