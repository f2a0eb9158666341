"""The experiment of `walk.py`, in place of all others, and runs without the slow part of drawing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def job(walk: Walk) -> Run:
    return make_run(walk)
