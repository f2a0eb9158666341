"""Controls of RNA velocity: what the scores of a method are without unspliced counts, or with shuffled ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fluxmatching.velocity.fit import check_arguments, delete_results, write_shared_flow
from fluxmatching.velocity.genes import GeneStatistics
from fluxmatching.velocity.layers import AveragedLayer, Columns, Layer, PermutedLayer, ScaledLayer, gene_blocks
from fluxmatching.velocity.moments import Sources, read_sources
from fluxmatching.velocity.options import SharedFlowOptions
from fluxmatching.velocity.shared_flow import FlowFit, fit_sources, state_of, statistics_of
from fluxmatching.velocity.state import CellState

if TYPE_CHECKING:
    from anndata import AnnData


def control_without_unspliced(
    adata: AnnData,
    *,
    options: SharedFlowOptions | None = None,
    vkey: str = "control",
    ukey: str = "Mu",
    xkey: str = "Ms",
) -> None:
    """Write the shared flow of genes that relax to their mean, ds/dt = mean(s) - s, without unspliced counts.

    Such a flow is smooth and points along the cells, so measures that reward this rate it highly. A method whose scores
    are not above those of this control has shown nothing. Unspliced counts choose the genes alone, those of the shared
    flow and those for later steps. The restriction to the cells matters: mean(s) - s without it is a much weaker
    control.

    Writes `layers[vkey]`, `var[vkey + "_genes"]` and `uns[vkey + "_params"]`.

    Args:
        adata, options, vkey, ukey, xkey: as in `flux_velocity`.

    Raises:
        KeyError, ValueError, TypeError: as `flux_velocity`.
    """
    options = SharedFlowOptions() if options is None else options
    check_arguments(adata, (vkey, ukey, xkey), False, options)
    sources = read_sources("control_without_unspliced", adata, options, ukey, xkey)
    genes, state = statistics_of(sources), state_of(sources, options)
    flow = relaxing_fit(state, sources, genes, options).flow()
    cells, count = sources.spliced.shape
    velocity = np.full((cells, count), np.nan, dtype=np.float32)
    for chosen in gene_blocks(cells, np.flatnonzero(state.finite)):
        smoothed = state.smoothed[:, chosen].astype(np.float64)
        velocity[:, chosen] = (flow @ state.directions[:, chosen]) * (1 + smoothed)
    delete_results(adata, vkey)
    adata.layers[vkey] = velocity
    adata.var[f"{vkey}_genes"] = genes.velocity_genes
    adata.uns[f"{vkey}_params"] = {"mode": "control", "method": "without_unspliced", "ukey": ukey, "xkey": xkey}


def control_with_permuted_unspliced(
    adata: AnnData,
    seed: int = 0,
    *,
    options: SharedFlowOptions | None = None,
    vkey: str = "control",
    xkey: str = "Ms",
) -> None:
    """Write the shared flow of unspliced counts that were permuted among the cells, each gene in its own way.

    What is left is a flow that spliced counts alone determine. Writes what `flux_velocity` does, except for moments.

    Args:
        adata, options, vkey, xkey: as in `flux_velocity`.
        seed: determines the permutations.

    Raises:
        KeyError, ValueError, TypeError: as `flux_velocity`.
    """
    options = SharedFlowOptions() if options is None else options
    check_arguments(adata, (vkey, "Mu", xkey), False, options)
    sources = read_sources("control_with_permuted_unspliced", adata, options, "Mu", xkey)
    write_shared_flow(adata, vkey, fit_sources(permuted(sources, seed), options), None)
    adata.uns[f"{vkey}_params"] = {"mode": "control", "method": "permuted_unspliced", "xkey": xkey, "seed": seed}


def permuted(sources: Sources, seed: int) -> Sources:
    """Return sources whose unspliced counts are permuted among the cells, and averaged again.

    Counts are scaled before: permuted raw counts would follow the total of the cell that receives them.
    """
    return averaged_again(sources, PermutedLayer(ScaledLayer(sources.counts, sources.sizes), seed))


def averaged_again(sources: Sources, counts: Columns) -> Sources:
    """Return sources with other unspliced counts, which are scaled already, and their means over neighbors."""
    sizes = np.ones(len(sources.sizes))
    unspliced = AveragedLayer(counts, sizes, sources.mean)
    return dataclasses.replace(sources, unspliced=unspliced, counts=counts, sizes=sizes, missing={})


def relaxing_fit(state: CellState, sources: Sources, genes: GeneStatistics, options: SharedFlowOptions) -> FlowFit:
    """Return the fit whose genes all relax to their mean at the same rate, mean(s) - s."""
    cells, count = sources.spliced.shape
    means = np.concatenate([sources.spliced.genes(c).mean(0) for c in gene_blocks(cells, np.arange(count))])
    relaxing = dataclasses.replace(sources, unspliced=Layer(np.broadcast_to(means, (cells, count))), missing={})
    unit = dataclasses.replace(genes, ratio=np.where(genes.usable, 1.0, np.nan))
    fit = FlowFit(state, relaxing, unit, options)
    fit.parts = fit.kinetic()
    return fit
