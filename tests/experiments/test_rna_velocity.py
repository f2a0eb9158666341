"""Tests of the data sets and of whole runs of the experiment."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.common.registry import UsageError
from experiments.common.run import Run
from experiments.rna_velocity import EXPERIMENT, datasets, fits, simulated
from experiments.rna_velocity.datasets import DATASETS, load, subsample
from experiments.rna_velocity.experiment import Config, main
from experiments.rna_velocity.preparation import prepare
from experiments.rna_velocity.simulators import simulate_switches, simulate_tree

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that is searched for data."""
    monkeypatch.setattr(datasets, "data_folders", lambda: [tmp_path])
    return tmp_path


def counts(cells: int = 90, genes: int = 40) -> Any:
    """Raw counts of cells along a course, in two clusters of the pancreas; half of the genes are switched off."""
    made = simulate_switches(0, "cut short", 0.0, cells, genes)
    generator = np.random.default_rng(0)
    course = {"unspliced": made.expected_unspliced, "spliced": made.expected_spliced}
    course = {key: np.where(np.arange(genes) % 2, values, values[::-1]) for key, values in course.items()}
    layers = {key: generator.poisson(values).astype(np.float32) for key, values in course.items()}
    adata = anndata.AnnData(layers["spliced"].copy(), layers=layers)
    adata.obs["clusters"] = np.where(np.arange(cells) < cells // 2, "Ductal", "Ngn3 low EP")
    return adata


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


@pytest.mark.parametrize(("genes", "kept"), [(40, 40), (30, 30)])
def test_only_a_file_of_chosen_genes_keeps_those_with_few_counts(genes: int, kept: int) -> None:
    made = counts()
    made.layers["unspliced"][:, 0] = 0  # too few counts in cells that have both
    if genes < made.n_vars:
        pytest.importorskip("scanpy", reason="scanpy is not installed: pip install 'fluxkernels[rna]'")
    made.obsm["X_umap"] = np.zeros((made.n_obs, 2))
    datasets.preprocess(made, DATASETS["pancreas"], genes, seed=0)
    assert made.n_vars == kept
    assert ("0" in made.var_names) == (genes == 40)
    assert {"Ms", "Mu"} <= set(made.layers)


def test_data_that_need_scanpy_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(UsageError, match=r"this data set needs scanpy: pip install 'fluxkernels\[rna\]'"):
        datasets.preprocess(counts(), DATASETS["bone_marrow"], 30, seed=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("datasets", ("liver",), "datasets must be among pancreas, .* got liver"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("sigma", 0.0, "sigma must be above 0, got 0.0"),
        ("simulations", -1, "simulations must be at least 0, got -1"),
        ("tree_genes", 4, "tree_genes must be at least 20, got 4"),
        ("noise", (), "noise must be one or more levels of at least 0"),
        ("methods", (), "methods must be one or more of shared_flow, "),
        ("methods", ("steady",), "methods must be among shared_flow, .* got steady"),
        ("permutations", 5, "permutations must be 0 or at least 19, got 5"),
    ],
)
def test_bad_settings(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{name: value})


def test_calibration_compares_with_the_true_flow() -> None:
    """A flow that is the truth has no error, and its reverse the largest."""
    cells = simulate_switches(0, "cut short", 0.0, 100, 8)
    made = cells.to_anndata()
    prepare(made, counts=False)
    made.varm["velocity_flow"] = np.eye(8, 3)
    made.layers["Ms"] = cells.expected_spliced
    true = (cells.velocity / (1 + cells.expected_spliced))[:, :3]
    made.obsm["velocity_flow"] = np.where(np.arange(100)[:, None] < 40, true, -true)
    made.obs["velocity_spread"] = np.arange(100.0)
    rows = simulated.calibration(made, cells)
    assert [row["error"] for row in rows] == pytest.approx([0, 0, 2, 2, 2])
    assert [row["spread"] for row in rows] == pytest.approx([9.5, 29.5, 49.5, 69.5, 89.5])


def smoke_run(path: Path, **changes: Any) -> Run:
    config = dataclasses.replace(EXPERIMENT.config("smoke"), **changes)
    return Run(EXPERIMENT, "smoke", config, None, torch.device("cpu"), 0, path, progress=False)


def put_pancreas(folder: Path) -> None:
    path = folder / DATASETS["pancreas"].file
    path.parent.mkdir()
    made = counts()
    made.obsm["X_umap"] = np.random.default_rng(0).normal(size=(made.n_obs, 2))
    made.write_h5ad(path)


def test_smoke_run_and_its_summary(folder: Path, tmp_path: Path) -> None:
    put_pancreas(folder)
    made = smoke_run(tmp_path / "run", permutations=19)
    main(made)
    found = made.rows("fit")
    methods = [fits.SHARED, *fits.CONTROLS, fits.PAPER_START, fits.PAPER, fits.CIRCULATING_START, fits.CIRCULATING]
    assert [(row["method"], row["seed"]) for row in found] == [(method, 0) for method in methods]
    columns = [f"over_{what}_{how}" for what in ("cells", "edges") for how in fits.PROJECTIONS]
    assert all(-1 <= row[key] <= 1 for row in found for key in [*columns, "consistency", "published_consistency"])
    assert [row["edge"] for row in made.rows("edge")] == ["Ductal → Ngn3 low EP"] * len(methods)
    assert [row["dataset"] for row in made.rows("evidence")] == ["pancreas"]
    simulations = {(row["problem"], row["method"]) for row in made.rows("simulated")}
    assert simulations == {(p, m) for p in ("complete", "cut short", "tree", "network") for m in methods}
    assert len(made.rows("calibration")) == 4 * simulated.BINS
    drawn = {"pancreas-measures", "pancreas-shared-flow", "pancreas-per-gene", "simulated", "calibration"}
    assert {path.stem for path in made.figures} >= drawn
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "anndata 0." in summary
    assert "shared flow [without unspliced, permuted]" in summary
    before = made.rows()
    main(made)  # all is done: nothing is fitted again
    assert made.rows() == before


def test_without_data_the_simulations_run_and_the_summary_says_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(_: str) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "_scvelo", offline)
    made = smoke_run(tmp_path / "run", methods=("shared_flow",))
    main(made)
    advice = "Left out: pancreas could not be downloaded (OSError: no route to host); fetch it elsewhere"
    assert advice in capsys.readouterr().err
    assert advice in (tmp_path / "run" / "summary.md").read_text()
    assert not made.rows("fit")
    assert len(made.rows("simulated")) == 4 * 3
    with pytest.raises(UsageError, match="could not be downloaded"):
        main(smoke_run(tmp_path / "nothing", methods=("shared_flow",), simulations=0))


def test_a_control_that_does_as_well_is_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_pancreas(folder)
    monkeypatch.setattr(fits, "fit_control", lambda adata, _, seed: fits.flux_velocity(adata))
    made = smoke_run(tmp_path / "run", methods=("shared_flow",), simulations=0)
    main(made)
    compared = [result for result in made.results if "CBC" in result.quantity]
    assert len(compared) == 3
    assert [result.passed for result in compared] == [False] * 3


def test_an_epoch_of_the_papers_fit_has_its_last_smaller_minibatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(fits, "flux_velocity", lambda *_, options: given.append(options.iterations))
    made = smoke_run(tmp_path / "run", epochs=10, batch=256)
    fits.fit_per_gene(made, anndata.AnnData(shape=(3696, 3)), fits.PAPER, 0)
    assert given == [150]  # 15 per epoch for the pancreas


def test_a_fitted_file_is_compared_with_its_own_velocities(folder: Path, tmp_path: Path) -> None:
    dataset = DATASETS["dentate_gyrus_fitted"]
    made = counts()
    made.obs["clusters"] = np.where(made.obs["clusters"] == "Ductal", *dataset.edges[0])
    made.obsm["X_umap"] = np.random.default_rng(0).normal(size=(made.n_obs, 2))
    prepare(made)
    made.layers["velocity"] = made.layers["Mu"] - made.layers["Ms"]
    made.var["velocity_genes"] = True
    (folder / dataset.file).parent.mkdir()
    made.write_h5ad(folder / dataset.file)
    chosen = ("shared_flow", "per_gene")
    run = smoke_run(tmp_path / "run", datasets=("dentate_gyrus_fitted",), methods=chosen, simulations=0)
    main(run)
    agreement = {row["method"]: row["agreement"] for row in run.rows("fit")}
    assert agreement[fits.STORED] == pytest.approx(1, abs=1e-5)
    assert agreement[fits.SHARED] != agreement[fits.PAPER]
    assert all(-1 <= value <= 1 for value in agreement.values())


@pytest.mark.parametrize("mode", ["stochastic", "dynamical"])
def test_scvelo_fits_normalized_layers(mode: str) -> None:
    pytest.importorskip("scvelo", reason="scvelo is not installed")
    made = simulate_tree(0, 80, 40).to_anndata()
    prepare(made)
    with fits.quiet():
        fits.fit_scvelo(made, mode)
    np.testing.assert_allclose(made.layers["spliced"].sum(1), np.median(made.layers["spliced"].sum(1)), rtol=1e-5)
    known = np.isfinite(fits.ratio(made, f"{fits.SCVELO}{mode}"))
    assert known.sum() > 20


def test_scvelo_and_cellrank_take_the_result_as_it_is() -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
    kernels = pytest.importorskip("cellrank.kernels", reason="cellrank is not installed: pip install cellrank")
    import scanpy as sc

    from fluxmatching.velocity import flux_velocity

    made = counts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.pca(made)
        sc.pp.neighbors(made)
        sc.tl.umap(made)
        scv.pp.moments(made, n_neighbors=None, n_pcs=None)
        flux_velocity(made, vkey="flux")
        scv.tl.velocity_graph(made, vkey="flux", n_jobs=1, show_progress_bar=False)
        scv.tl.velocity_confidence(made, vkey="flux")
        scv.pl.velocity_embedding_stream(made, vkey="flux", basis="umap", color="clusters", show=False)
        kernel = kernels.VelocityKernel(made, vkey="flux", attr="layers").compute_transition_matrix(
            show_progress_bar=False, n_jobs=1
        )
    np.testing.assert_allclose(np.asarray(kernel.transition_matrix.sum(1)).ravel(), 1, atol=1e-5)
    assert made.obs["flux_confidence"].between(0, 1).all()
