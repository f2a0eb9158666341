"""Cross-boundary correctness and consistency by hand, and consistency against scVelo's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fluxmatching.velocity.metrics import cross_boundary_correctness, velocity_consistency

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")


def adata(positions: Any, velocities: Any, clusters: list[str], neighbors: list[list[int]]) -> Any:
    """Cells in the plane; the velocities are those of the embedding and, in two genes, of the layer."""
    count = len(clusters)
    distances = sparse.lil_matrix((count, count))
    for cell, others in enumerate(neighbors):
        for other in others:
            distances[cell, other] = 1.0 + other
    made = anndata.AnnData(np.zeros((count, np.shape(velocities)[1]), dtype=np.float32))
    made.layers["velocity"] = np.array(velocities, dtype=np.float32)
    made.obsm["X_umap"], made.obsm["velocity_umap"] = np.array(positions, dtype=float), made.layers["velocity"][:, :2]
    made.obs["clusters"] = clusters
    made.obsp["distances"] = distances.tocsr()
    return made


# Two cells of A beside one of B at the right and one of C above; the third cell of A has no neighbor elsewhere.
POSITIONS = [[0, 0], [0, 1], [-5, 0], [1, 0], [0, 3]]
CLUSTERS = ["A", "A", "A", "B", "C"]
NEIGHBORS = [[1, 3], [3, 4], [0], [0], [1]]
VELOCITIES = [[2, 0], [1, 1], [0, 0], [-1, 0], [0, 1]]


def test_cross_boundary_correctness_by_hand() -> None:
    found = cross_boundary_correctness(
        adata(POSITIONS, VELOCITIES, CLUSTERS, NEIGHBORS), [("A", "B"), ("A", "C"), ("B", "C")]
    )
    # A -> B: cell 0 moves right to it, cos 1; cell 1 moves at (1, 1) and B lies at (1, -1), cos 0.
    # A -> C: cell 1 alone, which lies at (0, 2): cos 1/√2. B -> C: no neighbors.
    assert found.edges == pytest.approx({("A", "B"): 0.5, ("A", "C"): 0.5**0.5})
    assert found.cells == {("A", "B"): 2, ("A", "C"): 1}
    assert found.mean_over_edges == pytest.approx((0.5 + 0.5**0.5) / 2)
    assert found.mean_over_cells == pytest.approx((1 + 0 + 0.5**0.5) / 3)


def test_it_averages_over_the_neighbors_of_a_cell_first() -> None:
    found = cross_boundary_correctness(
        adata(
            [[0, 0], [0, 5], [1, 0], [-1, 0]], [[1, 0], [0, -1], [0, 0], [0, 0]], list("AABB"), [[2, 3], [2], [], []]
        ),
        [("A", "B")],
    )
    # Cell 0: (1 - 1)/2 = 0; cell 1: (1, -5)/√26 against (0, -1).
    assert found.edges["A", "B"] == pytest.approx((0 + 5 / 26**0.5) / 2)


def test_consistency_by_hand() -> None:
    velocities = [[1, 2, 3], [2, 4, 6], [3, 2, 1], [1, 0, 1]]
    made = adata(np.zeros((4, 2)), velocities, list("AAAA"), [[1, 2], [0], [0, 1], [0, 1, 2]])
    # Pearson correlations: cells 0 and 1 agree, 2 is opposite, which counts as 0, and 3 is uncorrelated with all.
    np.testing.assert_allclose(velocity_consistency(made), [0, 1, 0, 0], atol=1e-12)


def test_consistency_leaves_out_genes() -> None:
    velocities = np.array([[1, 2, 3, 9], [2, 4, 6, -50], [1, 2, 3, 7]], dtype=float)
    made = adata(np.zeros((3, 2)), velocities, list("AAA"), [[1], [2], [0]])
    assert velocity_consistency(made).min() < 0.9
    made.var["velocity_genes"] = [True, True, True, False]
    np.testing.assert_allclose(velocity_consistency(made), 1)
    del made.var["velocity_genes"]
    made.layers["velocity"][1, 3] = np.nan
    with pytest.warns(UserWarning, match="1 of 12 velocities are not finite and left out; 0 of 3 cells"):
        found = velocity_consistency(made)
    # Pairs with cell 1 have three genes in common, on which the cells agree; cells 2 and 0 have all four.
    np.testing.assert_allclose(found, [1, 1, np.corrcoef(velocities[2], velocities[0])[0, 1]])


def test_consistency_is_scvelos_confidence() -> None:
    scvelo = pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[scvelo]'")
    generator = np.random.default_rng(0)
    neighbors = [list(generator.choice(np.delete(np.arange(60), i), 8, replace=False)) for i in range(60)]
    made = adata(np.zeros((60, 2)), generator.normal(size=(60, 20)), ["A"] * 60, neighbors)
    made.var["velocity_genes"] = generator.random(20) < 0.7
    made.uns["neighbors"] = {"distances_key": "distances", "connectivities_key": "distances", "params": {}}
    made.obsp["connectivities"] = made.obsp["distances"]
    ours = velocity_consistency(made)
    with suppress(KeyError):  # it is written before another result asks for moments, which these cells have not
        scvelo.tl.velocity_confidence(made)
    np.testing.assert_allclose(ours, made.obs["velocity_confidence"], rtol=1e-5, atol=1e-6)


def test_errors_say_what_is_missing() -> None:
    made = adata(POSITIONS, VELOCITIES, CLUSTERS, NEIGHBORS)
    with pytest.raises(ValueError, match=r"no cluster 'D'; there are \['A', 'B', 'C'\]"):
        cross_boundary_correctness(made, [("A", "D")])
    with pytest.raises(ValueError, match="no edge has a cell with a neighbor on its other side"):
        cross_boundary_correctness(made, [("B", "C")])
    for edges in (("Ductal", "Beta"), {"A": "B"}, [("A", "B", "C")], ("A", "AB")):
        with pytest.raises(TypeError, match=r"edges must be a list of pairs \(source, target\), got "):
            cross_boundary_correctness(made, edges)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"adata\.obsm has no 'velocity_tsne'|adata\.obsm has no 'X_tsne'"):
        cross_boundary_correctness(made, [("A", "B")], basis="tsne")
    with pytest.raises(KeyError, match=r"adata\.layers has no 'other'; flux_velocity makes it"):
        velocity_consistency(made, vkey="other")
    del made.obsp["distances"]
    with pytest.raises(KeyError, match=r"no 'distances' \(it has \[\]\); scanpy\.pp\.neighbors\(adata\) makes it"):
        velocity_consistency(made)


def test_consistency_of_sparse_velocities_and_lonely_cells() -> None:
    made = adata(POSITIONS, [[2, 0], [1, 3], [0, 0], [-1, 0], [0, 1]], CLUSTERS, [[1, 3], [3, 4], [], [0], [1]])
    expected = velocity_consistency(made)
    # Of two genes a correlation is ±1: cell 0 falls, 1 rises, 3 rises. Cell 2 has no neighbors.
    np.testing.assert_allclose(expected, [0, 1, np.nan, 0, 1], atol=1e-6)
    made.layers["velocity"] = sparse.csr_matrix(made.layers["velocity"])
    np.testing.assert_array_equal(velocity_consistency(made), expected)


def test_consistency_without_velocities() -> None:
    made = adata(POSITIONS, np.full((5, 2), np.nan), CLUSTERS, NEIGHBORS)
    with pytest.raises(ValueError, match="no gene has finite velocities in layers\\['velocity'\\]"):
        velocity_consistency(made)


def test_clusters_may_be_numbers() -> None:
    made = adata(POSITIONS, VELOCITIES, [1, 1, 1, 2, 3], NEIGHBORS)
    assert cross_boundary_correctness(made, [(1, 2)]).edges == pytest.approx({("1", "2"): 0.5})


class TestMissingValues:
    def random(self, seed: int = 0) -> Any:
        generator = np.random.default_rng(seed)
        neighbors = [list(generator.choice(np.delete(np.arange(20), i), 6, replace=False)) for i in range(20)]
        clusters = ["A"] * 10 + ["B"] * 10
        return adata(generator.normal(size=(20, 2)), generator.normal(size=(20, 12)), clusters, neighbors)

    def test_correctness_of_the_finite_cells_is_that_without_the_others(self) -> None:
        made = self.random()
        whole = cross_boundary_correctness(made, [("A", "B")])
        velocities = made.obsm["velocity_umap"].copy()
        by_cell = {}
        for cell in range(10):  # all other velocities missing: the value of one boundary cell
            made.obsm["velocity_umap"] = np.full_like(velocities, np.nan)
            made.obsm["velocity_umap"][cell] = velocities[cell]
            with suppress(ValueError):
                by_cell[cell] = cross_boundary_correctness(made, [("A", "B")]).edges["A", "B"]
        assert whole.edges["A", "B"] == pytest.approx(np.mean(list(by_cell.values())))
        made.obsm["velocity_umap"] = velocities.copy()
        made.obsm["velocity_umap"][[0, 1, 2], [0, 1, 0]] = np.nan, np.nan, np.inf
        found = cross_boundary_correctness(made, [("A", "B")])
        left = [value for cell, value in by_cell.items() if cell > 2]
        assert found.edges["A", "B"] == pytest.approx(np.mean(left))
        assert found.mean_over_cells == pytest.approx(np.mean(left))
        assert found.cells["A", "B"] == len(left)
        assert found.missing["A", "B"] == len(by_cell) - len(left) == whole.cells["A", "B"] - len(left) > 0

    def test_perfect_velocities_stay_perfect(self) -> None:
        """Five of twenty velocities missing once gave 0.7, all missing 0."""
        positions = np.concatenate([np.zeros((20, 2)), np.ones((1, 2))])
        made = adata(positions, np.ones((21, 2)), ["A"] * 20 + ["B"], [[20]] * 20 + [[0]])
        made.obsm["velocity_umap"][:5] = np.nan
        found = cross_boundary_correctness(made, [("A", "B")])
        assert found.edges["A", "B"] == pytest.approx(1)
        assert (found.cells["A", "B"], found.missing["A", "B"]) == (15, 5)
        made.obsm["velocity_umap"][:20] = np.nan
        with pytest.raises(ValueError, match="none of the 20 boundary cells has a finite velocity and position"):
            cross_boundary_correctness(made, [("A", "B")])

    def test_an_edge_without_finite_cells_does_not_count(self) -> None:
        made = adata(POSITIONS, VELOCITIES, CLUSTERS, NEIGHBORS)
        made.obsm["velocity_umap"][1] = np.nan
        found = cross_boundary_correctness(made, [("A", "B"), ("A", "C")])
        assert found.edges == pytest.approx({("A", "B"): 1.0})
        assert found.missing == {("A", "B"): 1, ("A", "C"): 1}
        assert found.mean_over_edges == found.mean_over_cells == pytest.approx(1)

    def test_a_missing_position_is_left_out_of_the_mean_over_neighbors(self) -> None:
        made = adata([[0, 0], [1, 0], [0, 1]], np.ones((3, 2)) * [1, 0], list("ABB"), [[1, 2], [], []])
        assert cross_boundary_correctness(made, [("A", "B")]).edges["A", "B"] == pytest.approx(0.5)
        made.obsm["X_umap"][2] = np.nan
        assert cross_boundary_correctness(made, [("A", "B")]).edges["A", "B"] == pytest.approx(1)

    def test_one_missing_cell_leaves_the_consistency_of_the_others(self) -> None:
        made = self.random()
        made.layers["velocity"][:, 5] = np.nan  # a gene that a fit has left out
        expected_graph = made.obsp["distances"].toarray()
        made.layers["velocity"][3] = np.nan
        with pytest.warns(UserWarning, match="1 of 20 cells have no value"):
            found = velocity_consistency(made)
        assert np.isnan(found).tolist() == [cell == 3 for cell in range(20)]
        values = np.delete(made.layers["velocity"], 5, axis=1)
        for cell in np.delete(np.arange(20), 3):
            others = [j for j in np.flatnonzero(expected_graph[cell]) if j != 3]
            mean = np.mean([np.corrcoef(values[cell], values[j])[0, 1] for j in others])
            assert found[cell] == pytest.approx(max(mean, 0), abs=1e-6)

    def test_scattered_missing_values_cost_only_themselves(self) -> None:
        made = self.random()
        generator = np.random.default_rng(1)
        for gene in range(12):
            made.layers["velocity"][generator.integers(20), gene] = np.nan
        with pytest.warns(UserWarning, match="12 of 240 velocities"):
            found = velocity_consistency(made)
        values, graph = made.layers["velocity"], made.obsp["distances"].toarray()
        for cell in range(20):
            pairs = []
            for j in np.flatnonzero(graph[cell]):
                both = np.isfinite(values[cell]) & np.isfinite(values[j])
                pairs.append(np.corrcoef(values[cell][both], values[j][both])[0, 1])
            assert found[cell] == pytest.approx(max(np.mean(pairs), 0), abs=1e-6)

    def test_nothing_in_common_is_an_error(self) -> None:
        made = adata(np.zeros((2, 2)), [[1, 2, np.nan, np.nan], [np.nan, np.nan, 1, 2]], ["A", "A"], [[1], [0]])
        with pytest.raises(ValueError, match="no two neighbors have finite velocities of the same genes"):
            velocity_consistency(made)


@pytest.mark.parametrize(
    "store",
    [
        lambda graph: graph.toarray(),
        sparse.csc_matrix,
        sparse.csr_array,
        lambda graph: graph.astype(int),
        lambda graph: graph + sparse.eye(graph.shape[0]) * 0.5,
    ],
    ids=["dense", "csc", "csr array", "integer", "self loops"],
)
def test_neighbors_do_not_depend_on_how_the_graph_is_stored(store: Any) -> None:
    made = adata(POSITIONS, VELOCITIES, CLUSTERS, NEIGHBORS)
    expected = cross_boundary_correctness(made, [("A", "B"), ("A", "C")]), velocity_consistency(made)
    stored = store(made.obsp["distances"])
    del made.obsp["distances"]
    made.obsp["distances"] = stored
    assert cross_boundary_correctness(made, [("A", "B"), ("A", "C")]) == expected[0]
    np.testing.assert_array_equal(velocity_consistency(made), expected[1])


def test_another_graph_by_name() -> None:
    made = adata(POSITIONS, VELOCITIES, CLUSTERS, NEIGHBORS)
    expected = cross_boundary_correctness(made, [("A", "B")])
    made.obsp["mine_distances"] = made.obsp["distances"]
    del made.obsp["distances"]
    made.uns["mine"] = {"distances_key": "mine_distances", "connectivities_key": "mine_connectivities"}
    assert cross_boundary_correctness(made, [("A", "B")], neighbors="mine") == expected
    assert cross_boundary_correctness(made, [("A", "B")], neighbors="mine_distances") == expected
    with pytest.raises(KeyError, match="has no 'yours'"):
        cross_boundary_correctness(made, [("A", "B")], neighbors="yours")
