"""Moments: means of size-normalized counts over neighbors, as `scvelo.pp.moments` defines them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fluxmatching.velocity.graph import averaging, find_graph
from fluxmatching.velocity.layers import AveragedLayer, Columns, Layer, check_annotated, gene_blocks, in_memory
from fluxmatching.velocity.sparse import sparse

if TYPE_CHECKING:
    from anndata import AnnData

    from fluxmatching.velocity.options import SharedFlowOptions


def moments(
    adata: AnnData, *, neighbors: str | None = None, counts: str = "unspliced", spliced_counts: str = "spliced"
) -> None:
    """Write `layers["Mu"]` and `layers["Ms"]`: means of counts over the neighbors of each cell and the cell itself.

    The formula of `scvelo.pp.moments`: M = D⁻¹ (A + I) X, with A the zeros and ones of the graph of connectivities and
    D its row sums. Counts, recognized as whole numbers, are first scaled to the median total of the layer.

    Args:
        adata: with both layers of counts and a graph of neighbors; results are dense, float32.
        neighbors: graph, as in `SharedFlowOptions`.
        counts, spliced_counts: layers of unspliced and spliced counts.

    Raises:
        KeyError: a layer or the graph is missing.
        ValueError, TypeError: a layer or the graph is not what it should be.
    """
    function = "moments"
    check_annotated(function, adata)
    mean = averaging(find_graph(function, adata, "connectivities", neighbors))
    names = counts, spliced_counts
    layers = [read_layer(function, adata, name) for name in names]
    unspliced, spliced = zip(names, layers, strict=True)
    warn_of_one_normalized_layer(function, unspliced, spliced, stacklevel=3)
    for key, layer in zip(("Mu", "Ms"), layers, strict=True):
        adata.layers[key] = dense(AveragedLayer(layer, size_factors(layer), mean))


def read_layer(function: str, adata: AnnData, name: str, setting: str | None = None) -> Layer:
    """Return a layer of counts in memory; errors name the setting that the user gives the name to, or the function.

    Raises:
        KeyError: there is no such layer.
    """
    if name not in adata.layers:
        owner = function if setting is None else setting
        raise KeyError(
            f"{function}: adata.layers has no {name!r} (it has {sorted(adata.layers)}); counts of unspliced and "
            f"spliced molecules come from a program such as velocyto, alevin-fry, kallisto or STARsolo; "
            f"{owner}(counts=..., spliced_counts=...) takes layers of other names"
        )
    return Layer(in_memory(function, f"layers[{name!r}]", adata.layers[name]))


def dense(columns: Columns) -> np.ndarray:
    """Return all values of a layer, `[cells, genes]`, float32."""
    cells, genes = columns.shape
    values = np.empty((cells, genes), dtype=np.float32)
    for chosen in gene_blocks(cells, np.arange(genes)):
        values[:, chosen] = columns.genes(chosen)
    return values


def size_factors(counts: Layer) -> np.ndarray:
    """Return the factor of each cell that scales its counts to the median total, `[cells]`; 1 if they are not counts.

    Values that are no whole numbers have been normalized before.
    """
    totals = counts.totals()
    if not are_counts(counts) or not (totals > 0).any():
        return np.ones(len(totals))
    return np.divide(np.median(totals[totals > 0]), totals, out=np.zeros(len(totals)), where=totals > 0)


def are_counts(layer: Layer) -> bool:
    """Return whether all values of a layer are whole numbers, or missing."""
    stored = layer.values.data if sparse.issparse(layer.values) else layer.values
    return all(np.array_equal(part, np.rint(part), equal_nan=True) for part in np.array_split(stored, 64))


def warn_of_one_normalized_layer(
    function: str, unspliced: tuple[str, Layer], spliced: tuple[str, Layer], stacklevel: int
) -> None:
    """Warn if one layer, given with its name, holds counts and the other does not.

    Layers that share their memory with `adata.X` change when that is normalized.
    """
    whole = [are_counts(layer) for _, layer in (unspliced, spliced)]
    if whole[0] != whole[1]:
        (counts, _), (other, _) = (unspliced, spliced) if whole[0] else (spliced, unspliced)
        warnings.warn(
            f"{function}: layers[{counts!r}] holds whole numbers, layers[{other!r}] does not; if it is adata.X itself, "
            f"it was normalized with that, and a copy() of the counts prevents this",
            stacklevel=stacklevel,
        )


@dataclass(frozen=True)
class Sources:
    """Data that a shared flow is fitted to.

    Attributes:
        unspliced, spliced: moments.
        counts: unspliced counts, not averaged.
        sizes: factor of each cell for the counts, `[cells]`.
        graph: zeros and ones, from `neighbor_graph`.
        mean: matrix of means over neighbors and the cell itself.
        missing: the moments that annotated data lacked, by name of their layer.
    """

    unspliced: Columns
    spliced: Columns
    counts: Columns
    sizes: np.ndarray
    graph: sparse.csr_array
    mean: sparse.csr_array
    missing: dict[str, Columns] = field(default_factory=dict)


def read_sources(function: str, adata: AnnData, options: SharedFlowOptions, ukey: str, xkey: str) -> Sources:
    """Find what a shared flow needs in annotated data; moments that are missing are computed block by block.

    Raises:
        KeyError: the graph or a layer of counts is missing.
        ValueError, TypeError: one of them is not what it should be.
    """
    check_annotated(function, adata)
    setting = "SharedFlowOptions"
    graph = find_graph(function, adata, "connectivities", options.neighbors, setting)
    mean = averaging(graph)
    counts = read_layer(function, adata, options.counts, setting)
    found: dict[str, Columns] = {}
    missing: dict[str, Columns] = {}
    for key, name, default in ((ukey, options.counts, "Mu"), (xkey, options.spliced_counts, "Ms")):
        if key in adata.layers:
            found[key] = Layer(in_memory(function, f"layers[{key!r}]", adata.layers[key]))
        elif key != default:
            raise KeyError(f"{function}: adata.layers has no {key!r} (it has {sorted(adata.layers)})")
        else:
            layer = counts if name == options.counts else read_layer(function, adata, name, setting)
            warn_of_one_normalized_layer(function, (options.counts, counts), (name, layer), stacklevel=4)
            found[key] = missing[key] = AveragedLayer(layer, size_factors(layer), mean)
    return Sources(found[ukey], found[xkey], counts, size_factors(counts), graph, mean, missing)
