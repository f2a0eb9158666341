"""Tests of preparation, projection and measures of RNA velocity against plain loops, hand calculations and scVelo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from experiments.rna_velocity import measures
from experiments.rna_velocity.preparation import (
    nearest_neighbors,
    normalize_totals,
    prepare,
    principal_components,
)
from experiments.rna_velocity.projection import cosines, displacements, project
from experiments.rna_velocity.simulators import simulate_switches, simulate_tree

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[test]'")


def prepared(cells: int = 120, genes: int = 30) -> Any:
    made = simulate_tree(0, cells, genes).to_anndata()
    prepare(made)
    made.layers["velocity"] = made.layers["true_velocity"].copy()
    made.obsm["X_umap"] = made.obsm["X_pca"][:, :2]
    return made


# Preparation


def test_nearest_neighbors_are_those_of_all_distances() -> None:
    x = np.random.default_rng(0).normal(size=(1100, 3))  # more than one block
    found = nearest_neighbors(x, 5)
    assert found.shape == (1100, 1100)
    for cell in (0, 1023, 1024, 1099):
        distance = np.linalg.norm(x - x[cell], axis=1)
        distance[cell] = np.inf
        row = found[[cell]].toarray()[0]
        nearest = np.argsort(distance)[:5]
        assert set(np.flatnonzero(row)) == set(nearest)
        np.testing.assert_allclose(row[nearest], distance[nearest], rtol=1e-6)


def test_equal_cells_remain_neighbors() -> None:
    found = nearest_neighbors(np.zeros((4, 2)), 9)
    assert found.nnz == 12
    assert found.min(axis=None) == 0.0
    assert np.all(found.data > 0)


def test_principal_components_are_those_of_a_full_decomposition() -> None:
    x = np.random.default_rng(0).normal(size=(60, 12)) * np.arange(1, 13)
    found = principal_components(x, 4)
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = (left * values)[:, :4]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_prepared_moments_are_means_over_neighbors() -> None:
    made = prepared(60)
    assert np.all(np.diff(made.obsp["distances"].indptr) == 29)
    symmetric = made.obsp["connectivities"].toarray()
    np.testing.assert_array_equal(symmetric, symmetric.T)
    near = made.obsp["distances"].toarray() > 0
    np.testing.assert_array_equal(symmetric > 0, near | near.T)
    counts = normalize_totals(np.asarray(made.layers["unspliced"], float))
    for cell in (0, 59):
        others = np.append(np.flatnonzero(symmetric[cell]), cell)
        np.testing.assert_allclose(made.layers["Mu"][cell], counts[others].mean(0), rtol=1e-5, atol=1e-6)


def test_totals_become_their_median() -> None:
    found = normalize_totals(np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0], [2.0, 4.0]]))
    np.testing.assert_allclose(found.sum(1), [3, 3, 0, 3])
    np.testing.assert_allclose(found[1], [2.25, 0.75])


# Projection


def plain_projection(
    states: np.ndarray, velocity: np.ndarray, near: np.ndarray, y: np.ndarray, root: bool
) -> np.ndarray:
    """The formulas of `project`, by loops."""

    def turn(vector: np.ndarray) -> np.ndarray:
        return np.sign(vector) * np.sqrt(np.abs(vector)) if root else vector

    cells = len(states)
    reached = near | (near.astype(int) @ near.astype(int) > 0)
    table = np.zeros((cells, cells))
    for i in range(cells):
        for j in np.flatnonzero(reached[i]):
            if i != j:
                table[i, j] = np.corrcoef(turn(states[j] - states[i]), turn(velocity[i]))[0, 1]
    most = np.maximum(table.max(1), 0)
    stay = np.exp(10 * np.clip(np.percentile(most, 98) - most, 0, 1)) - 1
    found = np.zeros((cells, 2))
    for i in range(cells):
        others = np.flatnonzero(table[i])
        weights = np.sign(table[i, others]) * (np.exp(10 * np.abs(table[i, others])) - 1)
        weights /= np.abs(weights).sum() + stay[i]
        steps = y[others] - y[i]
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        found[i] = ((weights - weights.mean())[:, None] * steps).sum(0)
    return found


@pytest.mark.parametrize("root", [False, True])
def test_projection_is_that_of_plain_loops(root: bool) -> None:
    made = prepared(60, 20)
    genes = np.arange(20) % 3 > 0
    project(made, "umap", root=root, genes=genes)
    near = made.obsp["distances"].toarray() > 0
    expected = plain_projection(
        made.layers["Ms"][:, genes].astype(float), made.layers["velocity"][:, genes], near, made.obsm["X_umap"], root
    )
    np.testing.assert_allclose(made.obsm["velocity_umap"], expected, atol=2e-5)
    before = made.obsp["distances"].copy()
    project(made, "umap", root=root)
    assert (made.obsp["distances"] != before).nnz == 0  # the graph is not touched


@pytest.mark.parametrize("root", [False, True])
def test_projection_is_scvelos_up_to_scale(root: bool) -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed")
    made = prepared(100, 30)
    made.var["velocity_genes"] = np.arange(30) % 4 > 0
    project(made, "umap", root=root)
    ours = made.obsm["velocity_umap"].copy()
    scv.tl.velocity_graph(made, n_jobs=1, show_progress_bar=False, sqrt_transform=root)
    scv.tl.velocity_embedding(made, basis="umap", autoscale=False)
    np.testing.assert_allclose(ours, made.obsm["velocity_umap"], atol=1e-5)


def test_missing_genes_and_resting_cells_do_not_matter() -> None:
    made = prepared(60, 20)
    made.var["velocity_genes"] = True
    made.layers["velocity"][3] = 0
    project(made, "umap", root=False, genes=np.arange(20) > 0)
    expected = made.obsm["velocity_umap"].copy()
    made.layers["velocity"][5, 0] = np.nan
    project(made, "umap", root=False)
    np.testing.assert_array_equal(made.obsm["velocity_umap"], expected)
    np.testing.assert_array_equal(expected[3], 0)
    assert np.isfinite(expected).all()


def test_a_cell_without_others_does_not_move() -> None:
    graph = sp.csr_array((np.array([0.5]), (np.array([0]), np.array([1]))), shape=(2, 2))
    found = displacements(graph, np.array([[0.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(found, 0, atol=1e-12)  # of a single neighbor, weight minus mean weight is zero


def test_cosines_reach_the_neighbors_neighbors_when_told() -> None:
    states = np.arange(4.0)[:, None] * np.array([1.0, -1.0])
    velocity = np.tile([1.0, -1.0], (4, 1))
    chain = sp.csr_array(np.eye(4, k=1))
    direct = cosines(states, velocity, chain, root=False, recurse=False).toarray()
    np.testing.assert_allclose(direct, np.eye(4, k=1), atol=1e-6)
    reached = cosines(states, velocity, chain, root=False).toarray()
    np.testing.assert_allclose(reached, np.eye(4, k=1) + np.eye(4, k=2), atol=1e-6)


# Measures


def test_errors_by_hand() -> None:
    made = prepared(40, 3)
    made.layers["true_velocity"] = np.tile([[1.0, 0.0, 1.0]], (40, 1))
    made.layers["true_velocity"][0] = [1.0, 0.0, -0.01]
    velocity = np.tile([[1.0, 1.0, 1.0]], (40, 1))
    velocity[1] = [-1.0, 1.0, np.nan]
    made.layers["velocity"] = velocity
    made.var["true_ratio"] = [1.0, np.nan, 1.0]
    found = measures.errors(made, np.array([np.e, 2.0, 9.0]))
    # Gene 2 has no velocity in one cell and is left out; gene 1 never moves.
    assert found["known"] == 2
    assert found["cells"] == pytest.approx((39 * np.sqrt(0.5) - np.sqrt(0.5)) / 40)
    assert found["genes"] == pytest.approx(38 / 40)
    assert found["signs"] == pytest.approx(39 / 40)
    assert found["ratio"] == pytest.approx(1.0)


def test_signs_of_nearly_resting_cells_do_not_count() -> None:
    made = prepared(40, 3)
    made.layers["true_velocity"] = np.ones((40, 3))
    made.layers["true_velocity"][:10] = -0.04
    made.layers["velocity"] = np.random.default_rng(0).uniform(1, 2, (40, 3))
    assert measures.errors(made, np.ones(3))["signs"] == 1
    made.layers["true_velocity"][:10] = -0.06
    assert measures.errors(made, np.ones(3))["signs"] == pytest.approx(0.75)


def test_the_truth_is_measured_as_right_and_its_reverse_as_wrong() -> None:
    made = simulate_switches(1, "cut short", 0.5, 200, 30).to_anndata()
    prepare(made, counts=False)
    made.layers["velocity"] = 3 * made.layers["true_velocity"]
    found = measures.errors(made, made.var["true_ratio"].to_numpy())
    assert (found["cells"], found["genes"], found["signs"]) == pytest.approx((1, 1, 1))
    assert found["ratio"] == pytest.approx(0)
    assert found["time"] > 0.95
    made.layers["velocity"] *= -1
    found = measures.errors(made, made.var["true_ratio"].to_numpy())
    assert (found["cells"], found["genes"], found["signs"]) == pytest.approx((-1, -1, 0))
    assert found["time"] < -0.95


def test_pseudotime_of_a_gradient_is_its_potential() -> None:
    """For equal steps along a line with unit velocity, τ is the place on the line."""
    made = anndata.AnnData(np.zeros((6, 2), np.float32))
    place = np.arange(6.0)
    made.layers["Ms"] = place[:, None] * np.array([1.0, -1.0])
    made.obsm["X_pca"] = place[:, None]
    made.obsp["connectivities"] = sp.csr_matrix(np.eye(6, k=1) + np.eye(6, k=-1))
    time = measures.pseudotime(made, np.tile([1.0, -1.0], (6, 1)), np.array([True, True]))
    np.testing.assert_allclose(np.diff(time), 1, atol=1e-5)


def test_published_genes_are_those_of_plain_regressions() -> None:
    generator = np.random.default_rng(0)
    s = generator.uniform(0, 3, (200, 5))
    u = s * np.array([0.5, 0.5, 0.005, 0.5, 0.5]) + generator.normal(size=(200, 5)) * np.array(
        [0.01, 5, 0.0001, 0.1, 0]
    )
    u[:, 4] = generator.uniform(1, 2, 200)  # does not depend on s
    s[:, 3], u[:, 3] = 0.0, 0.0
    made = anndata.AnnData(s.astype(np.float32), layers={"Ms": s, "Mu": np.clip(u, 0, None)})
    kept = []
    for gene in range(5):
        x, y = s[:, gene], np.clip(u[:, gene], 0, None)
        if not x.any():
            kept.append(False)
            continue
        place = x / x.max() + y / y.max()
        ends = place >= np.percentile(place, 95)
        slope = np.linalg.lstsq(x[ends, None], y[ends], rcond=None)[0][0]
        kept.append(bool(1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum() > 0.01 and slope > 0.01))
    assert kept[0]
    assert not kept[2]  # by its slope
    assert not kept[4]  # by R²
    assert measures.published_genes(made).tolist() == kept


def test_published_genes_are_scvelos() -> None:
    scv = pytest.importorskip("scvelo", reason="scvelo is not installed")
    made = prepared(120, 40)
    scv.tl.velocity(made, mode="stochastic")
    np.testing.assert_array_equal(measures.published_genes(made), made.var["velocity_genes"].to_numpy())


def test_published_consistency_is_that_of_plain_loops() -> None:
    made = prepared(50, 10)
    made.layers["velocity"][0, 0] = np.nan
    v = made.layers["velocity"][:, 1:]
    near = made.obsp["distances"].toarray() > 0
    expected = np.mean(
        [
            np.mean([v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j]) for j in np.flatnonzero(near[i])])
            for i in range(50)
        ]
    )
    assert measures.published_consistency(made) == pytest.approx(expected, rel=1e-6)
