"""Controls of RNA velocity: what the scores of a method are without unspliced counts, or with shuffled ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fluxmatching.velocity.fit import check_arguments, write_shared_flow
from fluxmatching.velocity.layers import AveragedLayer, Layer, PermutedLayer, gene_blocks
from fluxmatching.velocity.moments import Sources, read_sources
from fluxmatching.velocity.options import SharedFlowOptions
from fluxmatching.velocity.shared_flow import fit_sources, statistics_of

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
    """Write velocities that relax to the mean, v = r (mean(s) - s): no unspliced count decides a direction.

    s is averaged over neighbors twice, as in the shared flow; r = γ/β of each gene only sets its unit. Such a field is
    smooth and points along the cells, so measures that reward this rate it highly. A method whose scores are not above
    those of this control has shown nothing.

    Writes `layers[vkey]`, `var[vkey + "_genes"]` and `uns[vkey + "_params"]`.

    Args:
        adata, options, vkey, ukey, xkey: as in `flux_velocity`.

    Raises:
        KeyError, ValueError, TypeError: as `flux_velocity`.
    """
    check_arguments(adata, (vkey, ukey, xkey), copy=False)
    options = SharedFlowOptions() if options is None else options
    sources = read_sources("control_without_unspliced", adata, options, ukey, xkey)
    genes = statistics_of(sources)
    cells, count = sources.spliced.shape
    velocity = np.full((cells, count), np.nan, dtype=np.float32)
    for chosen in gene_blocks(cells, np.flatnonzero(genes.usable)):
        smoothed = sources.mean @ sources.spliced.genes(chosen)
        velocity[:, chosen] = genes.ratio[chosen] * (smoothed.mean(0) - smoothed)
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
    check_arguments(adata, (vkey, "Mu", xkey), copy=False)
    options = SharedFlowOptions() if options is None else options
    sources = read_sources("control_with_permuted_unspliced", adata, options, "Mu", xkey)
    write_shared_flow(adata, vkey, fit_sources(permuted(sources, seed), options), None)
    adata.uns[f"{vkey}_params"] = {"mode": "control", "method": "permuted_unspliced", "xkey": xkey, "seed": seed}


def permuted(sources: Sources, seed: int) -> Sources:
    """Return sources whose unspliced counts are permuted among the cells, and averaged again."""
    counts = PermutedLayer(sources.counts, seed)
    unspliced = AveragedLayer(counts, sources.sizes, sources.mean)
    return dataclasses.replace(sources, unspliced=unspliced, counts=counts, missing={})


def without_unspliced(sources: Sources) -> Sources:
    """Return sources whose unspliced abundance is the mean of the spliced one: kinetics are then mean(s) - s."""
    cells, count = sources.spliced.shape
    means = np.concatenate([sources.spliced.genes(c).mean(0) for c in gene_blocks(cells, np.arange(count))])
    return dataclasses.replace(sources, unspliced=Layer(np.broadcast_to(means, (cells, count))), missing={})
