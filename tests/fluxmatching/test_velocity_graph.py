"""Which cells are neighbors, from every way to store a graph; means over them; layers in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fluxmatching.velocity.graph import averaging, neighbor_graph
from fluxmatching.velocity.layers import AveragedLayer, Layer, PermutedLayer, in_memory

GRAPH = np.array([[0.0, 0.5, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("kind", ["connectivities", "distances"])
@pytest.mark.parametrize("store", [np.array, sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix, sparse.lil_matrix])
def test_stored_values_are_neighbors(store: Any, kind: str) -> None:
    np.testing.assert_array_equal(neighbor_graph("f", store(GRAPH), 4, kind).toarray(), GRAPH > 0)


def test_self_loops_and_duplicates_do_not_count() -> None:
    row, column = [0, 0, 0, 1, 2], [0, 1, 1, 2, 2]
    graph = sparse.coo_array(([9.0, 1.0, 1.0, 3.0, 1.0], (row, column)), shape=(3, 3))
    np.testing.assert_array_equal(neighbor_graph("f", graph, 3).toarray(), [[0, 1, 0], [0, 0, 1], [0, 0, 0]])


def test_a_stored_zero_is_a_distance_and_no_connection() -> None:
    graph = sparse.csr_array(([0.0, 1.0, 0.0], [1, 2, 0], [0, 2, 3, 3]), shape=(3, 3))
    assert neighbor_graph("f", graph, 3, "distances").toarray().tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert neighbor_graph("f", graph, 3, "connectivities").toarray().tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_an_infinite_distance_is_no_neighbor() -> None:
    graph = np.array([[0.0, np.inf], [1.0, 0.0]])
    assert neighbor_graph("f", graph, 2, "distances").toarray().tolist() == [[0, 0], [1, 0]]


def test_the_graph_is_not_changed() -> None:
    graph = sparse.csr_array(GRAPH + np.eye(4))
    neighbor_graph("f", graph, 4)
    np.testing.assert_array_equal(graph.toarray(), GRAPH + np.eye(4))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (np.zeros((3, 3)), r"must be of shape \(4, 4\), got \(3, 3\); it belongs to other cells"),
        (-GRAPH, "negative values or NaN"),
        (np.full((4, 4), np.nan), "negative values or NaN"),
        (np.zeros(4), "must have two dimensions"),
    ],
)
def test_what_is_no_graph(graph: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbor_graph("f", graph, 4)


def test_means_over_neighbors() -> None:
    graph, x = neighbor_graph("f", GRAPH, 4), np.array([1.0, 2.0, 4.0, 8.0])
    np.testing.assert_allclose(averaging(graph) @ x, [11 / 3, 1.5, 3, 8])
    np.testing.assert_allclose(averaging(graph, include_self=False) @ x, [5, 1, 2, 0])


STORES: dict[str, Any] = {
    "float64": lambda x: x,
    "float32": lambda x: x.astype(np.float32),
    "integer": lambda x: x.astype(int),
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_array,
    "coo": sparse.coo_matrix,
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
def test_blocks_of_a_layer(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxmatching.velocity.layers.CHUNK", 4)
    values = np.random.default_rng(0).poisson(0.7, (9, 17)).astype(float)
    layer = Layer(in_memory("f", "layer", store(values)))
    for chosen in ([0], [16, 2, 3], [5, 4, 4], list(range(17))):
        found = layer.genes(np.array(chosen))
        np.testing.assert_array_equal(found, values[:, chosen])
        assert found.dtype == np.float64
    found *= 2  # the caller may change a block
    np.testing.assert_array_equal(layer.genes(np.array([3])), values[:, [3]])
    np.testing.assert_array_equal(layer.totals(), values.sum(1))


def test_averages_and_permutations_of_a_layer() -> None:
    generator = np.random.default_rng(0)
    values, mean = generator.poisson(2, (6, 5)).astype(float), sparse.csr_array(generator.random((6, 6)))
    sizes = generator.random(6)
    chosen = np.array([3, 1])
    averaged = AveragedLayer(Layer(values), sizes, mean)
    expected = mean.toarray() @ (sizes[:, None] * values)
    np.testing.assert_allclose(averaged.genes(chosen), expected[:, chosen])
    permuted = PermutedLayer(Layer(values), seed=3)
    np.testing.assert_array_equal(permuted.genes(np.arange(5))[:, chosen], permuted.genes(chosen))
    np.testing.assert_array_equal(np.sort(permuted.genes(chosen), 0), np.sort(values[:, chosen], 0))
    assert not np.array_equal(permuted.genes(chosen), values[:, chosen])


@pytest.mark.parametrize(
    ("layer", "error"),
    [(np.array([["a"]]), TypeError), (np.ones((2, 2), complex), TypeError), (np.ones(3), ValueError)],
)
def test_what_is_no_layer(layer: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="f: layer must"):
        in_memory("f", "layer", layer)
