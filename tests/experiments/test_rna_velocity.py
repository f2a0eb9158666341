"""Data sets are found or asked for, and the smoke run, where scVelo is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import experiments.rna_velocity as rna_velocity
from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.rna_velocity import datasets
from experiments.rna_velocity.datasets import DATASETS, load, subsample

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where data are looked for."""
    monkeypatch.setattr(datasets, "data_folders", lambda: [tmp_path])
    return tmp_path


def counts(cells: int = 90, genes: int = 40) -> Any:
    """Raw counts of cells along a course, in two clusters of the pancreas."""
    generator = np.random.default_rng(0)
    time = np.sort(generator.uniform(0, 5, (cells, 1)), 0)
    gamma, most = generator.uniform(0.3, 0.9, genes), generator.uniform(5, 30, genes)
    layers = {
        "unspliced": generator.poisson(most * (1 - np.exp(-time))).astype(np.float32),
        "spliced": generator.poisson(most * (1 - np.exp(-gamma * time)) / gamma).astype(np.float32),
    }
    made = anndata.AnnData(layers["spliced"].copy(), layers=layers)
    made.obs["clusters"] = np.where(time[:, 0] < 2.5, "Ductal", "Ngn3 low EP")
    return made


def test_a_file_comes_before_a_download(folder: Path) -> None:
    path = folder / DATASETS["pancreas"].file
    path.parent.mkdir()
    counts().write_h5ad(path)
    assert load("pancreas", download=lambda _: pytest.fail("downloads")).n_obs == 90


def test_without_a_file_scvelos_loader_is_asked(folder: Path) -> None:
    assert load("bone_marrow", download=lambda loader: loader) == "bonemarrow"


def test_what_cannot_be_had_is_asked_for(folder: Path) -> None:
    def offline(_: str) -> Any:
        raise OSError("no route to host")

    with pytest.raises(UsageError, match=r"pancreas could not be downloaded \(OSError: no r.*put it at data/"):
        load("pancreas", download=offline)
    with pytest.raises(UsageError, match=r"no file of hindbrain: it is the GABAergic.*FLUXMATCHING_DATA"):
        load("hindbrain")


def test_the_variable_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXMATCHING_DATA", str(tmp_path))
    assert datasets.data_folders()[0] == tmp_path


def test_subsample_keeps_the_order() -> None:
    made = counts()
    few = subsample(made, 10, seed=0)
    assert few.n_obs == 10
    assert list(few.obs_names) == sorted(few.obs_names, key=int)
    assert subsample(made, 1000, seed=0) is made


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("datasets", ("liver",), "datasets must be among pancreas, .* got liver"),
        ("passes", 0, "passes must be above 0, got 0"),
        ("scvelo", ("steady",), "scvelo must be among"),
    ],
)
def test_bad_settings(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rna_velocity.Config(**{name: value})


def test_smoke_run_and_its_summary(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    path = folder / DATASETS["pancreas"].file
    path.parent.mkdir()
    counts().write_h5ad(path)
    config = rna_velocity.EXPERIMENT.presets["smoke"]
    made = Run(rna_velocity.EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, tmp_path / "run", progress=False)
    rna_velocity.run(made)
    fits = made.rows("fit")
    methods = ["stochastic", "flux untrained", "flux", "flux circulating"]
    assert [(row["method"], row["seed"]) for row in fits] == [(method, 0) for method in methods]
    columns = [f"over_{what}_{how}" for what in ("cells", "edges") for how in ("plain", "root")]
    assert all(-1 <= row[key] <= 1 for row in fits for key in [*columns, "consistency"])
    assert [row["edge"] for row in made.rows("edge")] == ["Ductal → Ngn3 low EP"] * 4
    drawn = {"pancreas-metrics", "pancreas-flux-portraits", "pancreas-flux-circulating-stream"}
    assert {path.stem for path in made.figures} >= drawn
    assert "scvelo 0." in (tmp_path / "run" / "summary.md").read_text()
    before = made.rows()
    rna_velocity.run(made)  # all is done: nothing is fitted again
    assert made.rows() == before
