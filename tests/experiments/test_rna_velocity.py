"""Tests of the data sets, and of whole runs where scVelo is installed."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.rna_velocity import EXPERIMENT, datasets
from experiments.rna_velocity.datasets import DATASETS, load, subsample
from experiments.rna_velocity.experiment import Config, main

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that is searched for data."""
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


def test_without_a_file_scvelos_loader_is_used(folder: Path) -> None:
    assert load("bone_marrow", download=lambda loader: loader) == "bonemarrow"


def test_missing_data_are_reported_with_advice(folder: Path) -> None:
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


@pytest.mark.parametrize(("genes", "min_counts"), [(40, None), (30, 20)])
def test_only_a_file_of_chosen_genes_keeps_those_with_few_counts(
    genes: int, min_counts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    given = []
    real = scv.pp.filter_and_normalize
    monkeypatch.setattr(
        scv.pp, "filter_and_normalize", lambda a, **options: (given.append(options["min_shared_counts"]), real(a))
    )
    made = counts()
    datasets.preprocess(made, DATASETS["pancreas"], genes, seed=0)
    assert given == [min_counts]
    assert made.n_vars == genes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("datasets", ("liver",), "datasets must be among pancreas, .* got liver"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("sigma", 0.0, "sigma must be above 0, got 0.0"),
        ("simulations", -1, "simulations must be at least 0, got -1"),
        ("simulated_genes", 1000, "simulated_cells must be at least 1001, got 1000"),
        ("noise", (), "noise must be one or more levels of at least 0"),
        ("scvelo", ("steady",), "scvelo must be among"),
    ],
)
def test_bad_settings(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{name: value})


@pytest.fixture
def simulated() -> Any:
    pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    from experiments.rna_velocity import simulated

    return simulated


@pytest.mark.parametrize("course", ["complete", "cut short"])
def test_simulated_truth(simulated: Any, course: str) -> None:
    """Without noise our closed form is scVelo's course, and its velocity the difference quotient of that."""
    adata = simulated.simulate(0, 0.0, course, cells=400, genes=6)
    time = adata.obs["true_t"].to_numpy()
    order = np.argsort(time, kind="stable")
    time, spliced, velocity = time[order], adata.layers["spliced"][order], adata.layers["true_velocity"][order]
    steps = np.diff(time)
    middle = (velocity[1:] + velocity[:-1]) / 2
    same_phase = (time[:-1, None] < adata.var["true_t_"].to_numpy()) == (
        time[1:, None] < adata.var["true_t_"].to_numpy()
    )
    # Times are kept to 0.01, so a quotient is right only over the whole way.
    traveled = np.where(same_phase, middle * steps[:, None], np.diff(spliced, axis=0)).sum(0)
    np.testing.assert_allclose(traveled, spliced[-1] - spliced[0], atol=0.02 * spliced.max())
    assert np.abs(velocity).max() > 0.5


def test_measures_by_hand(simulated: Any) -> None:
    made = anndata.AnnData(np.zeros((2, 3), np.float32))
    made.layers["true_velocity"] = np.array([[1.0, 1.0, 1.0], [1.0, -0.01, 1.0]])
    made.layers["velocity"] = np.array([[2.0, 1.0, np.nan], [0.0, 1.0, np.nan]])
    made.var["velocity_genes"] = [True, False, True]
    made.var["true_beta"], made.var["true_gamma"] = 1.0, [1.0, 2.0, 1.0]
    found = simulated.measure(made, np.array([np.e, 2.0, 9.0]))
    # Gene 0: cos 45 degrees, signs + and 0; gene 1: (1 - 0.01)/(√2 √1.0001), one sign counted; gene 2: no velocity.
    assert found["cosine"] == pytest.approx((np.sqrt(0.5) + 0.99 / np.sqrt(2 * 1.0001)) / 2)
    assert found["sign"] == pytest.approx(2 / 3)
    assert found["ratio_error"] == pytest.approx(0.5)
    assert found["ratio_bias"] == pytest.approx(0.5)
    assert (found["genes"], found["kept"]) == (2, 1)
    assert found["cosine_kept"] == pytest.approx(np.sqrt(0.5))


def test_a_perfect_method_is_measured_as_one(simulated: Any) -> None:
    adata = simulated.simulate(1, 1.0, "complete", cells=60, genes=5)
    adata.layers["velocity"] = 3 * adata.layers["true_velocity"]
    adata.var["velocity_genes"] = True
    found = simulated.measure(adata, (adata.var["true_gamma"] / adata.var["true_beta"]).to_numpy())
    assert found["cosine"] == pytest.approx(1)
    assert found["sign"] == 1
    assert found["ratio_error"] == pytest.approx(0)


def test_smoke_run_and_its_summary(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    path = folder / DATASETS["pancreas"].file
    path.parent.mkdir()
    counts().write_h5ad(path)
    config = EXPERIMENT.config("smoke")
    made = Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, tmp_path / "run", progress=False)
    main(made)
    fits = made.rows("fit")
    methods = ["stochastic", "flux untrained", "flux", "flux circulating untrained", "flux circulating"]
    assert [(row["method"], row["seed"]) for row in fits] == [(method, 0) for method in methods]
    columns = [f"over_{what}_{how}" for what in ("cells", "edges") for how in ("plain", "root")]
    assert all(-1 <= row[key] <= 1 for row in fits for key in [*columns, "consistency"])
    assert [row["edge"] for row in made.rows("edge")] == ["Ductal → Ngn3 low EP"] * 5
    drawn = {"pancreas-metrics", "pancreas-flux-portraits", "pancreas-flux-circulating-stream"}
    assert {path.stem for path in made.figures} >= drawn
    assert [row["method"] for row in made.rows("simulated")][-1] == "flux circulating"
    assert "simulated" in {path.stem for path in made.figures}
    assert "scvelo 0." in (tmp_path / "run" / "summary.md").read_text()
    before = made.rows()
    main(made)  # all is done: nothing is fitted again
    assert made.rows() == before


def test_a_fitted_file_is_compared_with_its_own_velocities(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    import scanpy as sc
    import scvelo as scv

    dataset = DATASETS["dentate_gyrus_fitted"]
    made = counts()
    made.obs["clusters"] = np.where(made.obs["clusters"] == "Ductal", *dataset.edges[0])
    for key, layer in (("Mu", "unspliced"), ("Ms", "spliced")):
        made.layers[key] = made.layers[layer]
    sc.pp.pca(made)
    sc.pp.neighbors(made)
    sc.tl.umap(made)
    scv.tl.velocity(made, mode="deterministic")
    (folder / dataset.file).parent.mkdir()
    made.write_h5ad(folder / dataset.file)
    config = dataclasses.replace(EXPERIMENT.config("smoke"), datasets=("dentate_gyrus_fitted",), simulations=0)
    run = Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, tmp_path / "run", progress=False)
    main(run)
    agreement = {row["method"]: row["agreement"] for row in run.rows("fit")}
    assert agreement["stored"] == pytest.approx(1, abs=1e-5)
    assert agreement["flux"] != agreement["flux circulating"]
    assert all(-1 <= value <= 1 for value in agreement.values())


def test_scvelo_and_cellrank_take_the_result_as_it_is() -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    kernels = pytest.importorskip("cellrank.kernels", reason="cellrank is not installed: pip install cellrank")
    import scanpy as sc

    from fluxmatching.velocity import VelocityOptions, flux_velocity

    made = counts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.pca(made)
        sc.pp.neighbors(made)
        sc.tl.umap(made)
        scv.pp.moments(made, n_neighbors=None, n_pcs=None)
        options = VelocityOptions.from_preset("circulating", progress=False)
        flux_velocity(made, "per_gene", vkey="flux", options=options)
        scv.tl.velocity_graph(made, vkey="flux", n_jobs=1, show_progress_bar=False)
        scv.tl.velocity_confidence(made, vkey="flux")
        scv.pl.velocity_embedding_stream(made, vkey="flux", basis="umap", color="clusters", show=False)
        kernel = kernels.VelocityKernel(made, vkey="flux", attr="layers").compute_transition_matrix(
            show_progress_bar=False, n_jobs=1
        )
    np.testing.assert_allclose(np.asarray(kernel.transition_matrix.sum(1)).ravel(), 1, atol=1e-5)
    assert made.obs["flux_confidence"].between(0, 1).all()
