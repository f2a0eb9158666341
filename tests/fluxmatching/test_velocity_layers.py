"""Velocity of annotated data however it is stored, moments against scVelo's, hand-over to CellRank, and errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fluxmatching.velocity import (
    SharedFlowOptions,
    control_with_permuted_unspliced,
    control_without_unspliced,
    cross_boundary_correctness,
    flux_velocity,
    moments,
    velocity_consistency,
    velocity_evidence,
)
from tests.support.velocity import annotated, mean_matrix, moments_of

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")

KINDS: dict[str, Any] = {
    "csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr array": sparse.csr_array, "csc array": sparse.csc_array,
    "integer": lambda layer: layer.astype(int), "float64": lambda layer: layer.astype(float),
}  # fmt: skip


def velocity(adata: Any, **settings: Any) -> np.ndarray:
    """Velocities of a copy."""
    return flux_velocity(adata, copy=True, **settings).layers["velocity"]


def fit(adata: Any, options: dict[str, Any] | None = None, **settings: Any) -> None:
    flux_velocity(adata, options=SharedFlowOptions(**options or {}), **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True], ids=["counts", "moments"])
def test_any_kind_of_layer(kind: str, given: bool) -> None:
    made = annotated(cells=80, genes=30)
    if given:
        moments(made)
        for key in ("Mu", "Ms"):
            made.layers[key] = np.round(made.layers[key])  # whole, so that every kind can hold them
    expected = velocity(made)
    for key in ("unspliced", "spliced", *(("Mu", "Ms") if given else ())):
        made.layers[key] = KINDS[kind](made.layers[key])
    np.testing.assert_allclose(velocity(made), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_view_and_data_on_disk(tmp_path: Path) -> None:
    made = annotated(cells=80, genes=30)
    expected = velocity(made)
    view = anndata.concat([made, made], index_unique="-", pairwise=True)[:80]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata, that a view becomes a copy
        flux_velocity(view)
    np.testing.assert_allclose(view.layers["velocity"], expected, rtol=1e-5, atol=1e-5)
    for name, store in (("dense", np.asarray), ("sparse", sparse.csr_matrix)):
        for key in ("unspliced", "spliced"):
            made.layers[key] = store(made.layers[key])
        made.write_h5ad(tmp_path / f"{name}.h5ad")
        backed = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        flux_velocity(backed)
        np.testing.assert_allclose(backed.layers["velocity"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_data_that_is_read_lazily(store: Any, tmp_path: Path) -> None:
    pytest.importorskip("dask", reason="read_lazy needs dask: pip install dask xarray")
    pytest.importorskip("xarray", reason="read_lazy needs xarray: pip install dask xarray")
    read_lazy = pytest.importorskip("anndata.experimental", reason="anndata has no experimental part").read_lazy
    import h5py

    made = annotated(cells=80, genes=30)
    expected = velocity(made)
    for key in ("unspliced", "spliced"):
        made.layers[key] = store(made.layers[key])
    made.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad") as file:
        lazy = read_lazy(file)
        assert hasattr(lazy.layers["unspliced"], "compute")
        assert hasattr(lazy.obsp["connectivities"], "compute")
        flux_velocity(lazy, options=SharedFlowOptions(keep_moments=False))
        np.testing.assert_allclose(lazy.layers["velocity"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", [lambda graph: graph.toarray(), sparse.csc_matrix, lambda graph: graph.astype(float)])
def test_any_kind_of_graph(store: Any) -> None:
    made = annotated(cells=80, genes=30)
    expected = velocity(made)
    made.obsp["connectivities"] = store(made.obsp["connectivities"] + sparse.eye(80, format="csr"))
    np.testing.assert_allclose(velocity(made), expected, rtol=1e-6, atol=1e-6)


def test_a_graph_by_name() -> None:
    made = annotated(cells=80, genes=30)
    expected = velocity(made)
    made.obsp["mine_connectivities"] = made.obsp["connectivities"]
    del made.obsp["connectivities"]
    made.uns["mine"] = {"connectivities_key": "mine_connectivities", "distances_key": "mine_distances"}
    for name in ("mine", "mine_connectivities"):
        found = velocity(made, options=SharedFlowOptions(neighbors=name))
        np.testing.assert_array_equal(found, expected)


def test_moments_are_their_formula() -> None:
    made = annotated(cells=60, genes=20)
    moments(made)
    mean = mean_matrix(made.obsp["connectivities"])
    for key, name in (("Mu", "unspliced"), ("Ms", "spliced")):
        np.testing.assert_allclose(made.layers[key], moments_of(made.layers[name], mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_moments_are_scvelos(normalized: bool) -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[scvelo]'")
    import scanpy as sc

    made = annotated(cells=120, genes=40)
    del made.obsp["connectivities"]
    for key in ("unspliced", "spliced"):
        made.layers[key] = sparse.csr_matrix(made.layers[key])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if normalized:
            scv.pp.normalize_per_cell(made)
        sc.pp.pca(made)
        sc.pp.neighbors(made, n_neighbors=12)
        theirs = made.copy()
        scv.pp.moments(theirs, n_neighbors=None, n_pcs=None)
    moments(made)
    for key in ("Mu", "Ms"):
        np.testing.assert_allclose(made.layers[key], theirs.layers[key], rtol=1e-4, atol=1e-5)


def test_scanpy_and_cellrank_are_enough(tmp_path: Path) -> None:
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed: pip install 'fluxkernels[rna]'")
    kernels = pytest.importorskip("cellrank.kernels", reason="cellrank is not installed: pip install cellrank")

    made = annotated(cells=120, genes=40)
    del made.obsp["connectivities"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.pca(made)
        sc.pp.neighbors(made, n_neighbors=12)
        flux_velocity(made, vkey="flux")
        made.write_h5ad(tmp_path / "cells.h5ad")
        made = anndata.read_h5ad(tmp_path / "cells.h5ad")
        kernel = kernels.VelocityKernel(made, vkey="flux").compute_transition_matrix(show_progress_bar=False, n_jobs=1)
        by_state = kernels.VelocityKernel(made, attr="obsm", xkey="X_flow", vkey="flux_flow")
        by_state.compute_transition_matrix(show_progress_bar=False, n_jobs=1)
    for computed in (kernel, by_state):
        matrix = sparse.csr_matrix(computed.transition_matrix)
        np.testing.assert_allclose(np.asarray(matrix.sum(1)).ravel(), 1, atol=1e-5)
        # Cells move on: the mean time of the next cell is later, except at the end of the course.
        time = made.obs["time"].to_numpy()
        later = matrix @ time - time
        assert np.mean(later[time < 16] > 0) > 0.8


def test_a_gene_that_is_not_finite_costs_only_itself() -> None:
    made = annotated(cells=80, genes=30)
    moments(made)
    expected = velocity(made[:, 1:].copy())
    made.layers["Ms"][7, 0] = np.nan
    with pytest.warns(UserWarning, match="1 of 30 genes have spliced abundances that are not finite"):
        found = flux_velocity(made, copy=True)
    assert np.isnan(found.layers["velocity"]).all(0).tolist() == [True] + [False] * 29
    assert np.isnan(found.var["velocity_gamma"].iloc[0])
    # The folds of the genes differ: the same flow up to what that changes.
    inside = np.einsum("ng,ng->n", found.layers["velocity"][:, 1:], expected)
    norms = np.linalg.norm(found.layers["velocity"][:, 1:], axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median(inside / norms) > 0.99


def test_a_gene_without_unspliced_counts_has_the_velocity_of_the_flow() -> None:
    made = annotated(cells=200, genes=40)
    truth = made.layers["true_velocity"][:, 3]
    made.layers["unspliced"][:, 3] = 0
    flux_velocity(made)
    assert not made.var["velocity_fitted"].iloc[3]
    assert not made.var["velocity_genes"].iloc[3]
    assert np.isnan(made.var["velocity_gamma"].iloc[3])
    assert np.corrcoef(made.layers["velocity"][:, 3], truth)[0, 1] > 0.7


def test_cells_without_neighbors_stand_still() -> None:
    made = annotated(cells=80, genes=30)
    graph = made.obsp["connectivities"].tolil()
    graph[5], graph[:, 5] = 0, 0
    made.obsp["connectivities"] = graph.tocsr()
    flux_velocity(made)
    assert not made.layers["velocity"][5].any()
    assert np.isfinite(made.layers["velocity"]).all()
    assert made.obs["velocity_spread"].iloc[5] == 1


def test_the_same_seed_gives_the_same_result_and_another_nearly() -> None:
    made = annotated(cells=200, genes=40)
    first, second, third = (velocity(made, options=SharedFlowOptions(seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)
    assert np.corrcoef(first.ravel(), third.ravel())[0, 1] > 0.95


def test_spread_is_larger_where_genes_disagree() -> None:
    made = annotated(cells=200, genes=40)
    flux_velocity(made)
    certain = made.obs["velocity_spread"].to_numpy()
    generator = np.random.default_rng(0)
    made.layers["unspliced"] = generator.permuted(made.layers["unspliced"], axis=0)
    del made.layers["Mu"]
    flux_velocity(made)
    assert np.median(made.obs["velocity_spread"]) > 3 * np.median(certain)
    assert made.obs["velocity_spread"].between(0, 1).all()
    flux_velocity(made, options=SharedFlowOptions(bootstraps=0), vkey="plain")
    assert "plain_spread" not in made.obs


@pytest.mark.parametrize("function", [flux_velocity, moments, velocity_evidence])
@pytest.mark.parametrize("name", ["spliced", "unspliced"])
def test_one_normalized_layer_is_warned_of(function: Any, name: str) -> None:
    made = annotated(cells=60, genes=25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(made.copy())
    made.layers[name] = np.log1p(made.layers[name])  # what scanpy does to adata.X in place
    other = {"spliced": "unspliced", "unspliced": "spliced"}[name]
    with pytest.warns(
        UserWarning, match=rf"layers\['{other}'\] holds whole numbers, layers\['{name}'\] does not"
    ) as found:
        function(made)
    assert found[0].filename == __file__


def test_moments_name_their_own_arguments() -> None:
    made = annotated(cells=40, genes=25)
    with pytest.raises(KeyError, match=r"moments\(counts=\.\.\., spliced_counts=\.\.\.\) takes layers of other"):
        moments(made, counts="nascent")
    del made.obsp["connectivities"]
    with pytest.raises(KeyError, match=r"moments\(neighbors=\.\.\.\) takes one made with key_added="):
        moments(made)


@pytest.mark.parametrize(
    "function",
    [
        flux_velocity,
        moments,
        velocity_evidence,
        control_without_unspliced,
        control_with_permuted_unspliced,
        velocity_consistency,
        lambda adata: cross_boundary_correctness(adata, [("A", "B")]),
    ],
)
def test_other_objects_than_annotated_data_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"adata must be an AnnData, got ndarray$"):
        function(np.ones((5, 3)))
    with pytest.raises(TypeError, match=r"adata must be an AnnData, got str; anndata\.read_h5ad reads one from a file"):
        function("cells.h5ad")


def test_without_scipy_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['scipy'] = None; import fluxmatching; import fluxmatching.velocity"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "ImportError: fluxmatching.velocity needs SciPy: pip install 'fluxkernels[rna]'" in done.stderr


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (lambda a: a.layers.pop("unspliced"), {}, KeyError, r"no 'unspliced' \(it has .*SharedFlowOptions\(counts="),
        (lambda a: a.layers.pop("spliced"), {}, KeyError, "no 'spliced'"),
        (lambda a: a.obsp.pop("connectivities"), {}, KeyError, r"no 'connectivities' .*SharedFlowOptions\(neigh"),
        (lambda a: a, {"options": {"neighbors": "mine"}}, KeyError, "no 'mine'"),
        (lambda a: a.layers["spliced"].fill(3), {}, ValueError, "the cells do not differ in their spliced abundances"),
        (lambda a: a.layers["unspliced"].fill(0), {}, ValueError, "no gene has finite unspliced and spliced"),
        (lambda a: a.layers["spliced"].fill(np.nan), {}, ValueError, "no gene has finite spliced .* in all cells"),
        (lambda a: np.negative(a.layers["unspliced"], out=a.layers["unspliced"]), {}, ValueError, "at least 0, got -"),
        (lambda a: a, {"options": {"ridge": 0.0}}, ValueError, "ridge must be a positive number, got 0.0"),
        (lambda a: a, {"options": {"folds": 1}}, ValueError, "folds must be a whole number, at least 2, got 1"),
        (lambda a: a, {"options": {"least_agreement": 2}}, ValueError, r"least_agreement must lie in \[-1, 1\], got 2"),
        (lambda a: a, {"options": {"least_agreement": "1"}}, TypeError, "least_agreement must be a number, got '1'"),
        (lambda a: a, {"options": {"counts": ""}}, TypeError, "counts must be a non-empty string, got ''"),
        (lambda a: a, {"options": {"keep_moments": 1}}, TypeError, "keep_moments must be True or False, got 1"),
        (lambda a: a, {"options": {"seed": -1}}, ValueError, "seed must be a whole number"),
        (lambda a: a, {"vkey": "Ms"}, ValueError, "vkey 'Ms' would overwrite the layer 'Ms'"),
    ],
)
def test_errors_leave_the_object_unchanged(
    change: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = annotated(cells=40, genes=25)
    change(made)
    layers, obsp, var = set(made.layers), set(made.obsp), set(made.var)
    with pytest.raises(error, match=message):
        fit(made, **settings)
    assert (set(made.layers), set(made.obsp), set(made.var)) == (layers, obsp, var)
    assert not len(made.obsm)
    assert not len(made.uns)
    assert set(made.obs) == {"time"}


def test_two_cells_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least three cells are needed, got 2"):
        flux_velocity(annotated(cells=40, genes=25)[:2].copy())


def test_three_cells_are_enough() -> None:
    made = annotated(cells=40, genes=25)[:3].copy()
    made.obsp["connectivities"] = np.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    flux_velocity(made)
    assert np.isfinite(made.layers["velocity"]).all()
