"""RNA velocity of annotated data, in scVelo's conventions.

>>> import scvelo as scv                                        # doctest: +SKIP
>>> from fluxmatching.velocity import flux_velocity
>>> flux_velocity(adata)                                        # doctest: +SKIP
>>> scv.tl.velocity_graph(adata)                                # doctest: +SKIP
>>> scv.pl.velocity_embedding_stream(adata)                     # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkernels.checks import check_choice
from fluxmatching.velocity.layers import check_annotated
from fluxmatching.velocity.moments import Sources, dense, read_sources
from fluxmatching.velocity.options import SharedFlowOptions, VelocityOptions
from fluxmatching.velocity.per_gene import fit_per_gene
from fluxmatching.velocity.shared_flow import SharedFlow, fit_sources

if TYPE_CHECKING:
    from anndata import AnnData

METHODS = ("shared_flow", "per_gene")
FUNCTION = "flux_velocity"


def flux_velocity(
    adata: AnnData,
    method: str = "shared_flow",
    *,
    preset: str | None = None,
    options: SharedFlowOptions | VelocityOptions | None = None,
    vkey: str = "velocity",
    ukey: str = "Mu",
    xkey: str = "Ms",
    copy: bool = False,
) -> AnnData | None:
    """Estimate RNA velocity, and write it where the functions of scVelo and CellRank look for it.

    Method "shared_flow" fits one flow of the whole state of a cell to the kinetics of all genes: see
    `fluxmatching.velocity.shared_flow`. It takes seconds. It needs a graph of neighbors (`scanpy.pp.neighbors`) and
    unspliced counts; moments that are missing are computed as `moments` does. The unit of time is the flow's own.

    Method "per_gene" is the paper's: the splicing model of every gene by itself, trained by Flux Matching: see
    `fluxmatching.velocity.per_gene`.

    The function writes, after the fit has succeeded::

        layers[vkey]                 ds/dt of every cell and gene; NaN in genes that were left out; 0 in cells without
                                     neighbors
        var[vkey + "_gamma"]         γ; with "shared_flow" in units of β, as scVelo's steady-state modes have it
        var[vkey + "_beta"]          β; with "shared_flow" 1
        var[vkey + "_genes"]         whether the gene is for later steps
        uns[vkey + "_params"]        "mode": "flux", the method and the options

    and with "shared_flow"

        obs[vkey + "_spread"]        spread of the direction over a bootstrap of genes: 0 certain, 1 arbitrary
        var[vkey + "_rate"]          γ in units of the flow's inverse time
        var[vkey + "_agreement"]     R² of the gene's own kinetics with its velocity, negative where they disagree
        var[vkey + "_fitted"]        whether the gene's kinetics made the flow
        obsm["X_flow"], obsm[vkey + "_flow"], varm[vkey + "_flow"]    state, its velocity, and its directions

    or with "per_gene"

        layers[vkey + "_u"], layers[vkey + "_alpha"]                  du/dt and α of every cell and gene
        var[vkey + "_a" / "_b" / "_c"], var[vkey + "_scale"]          of α = k softplus((a u + b s)/k + c), and k

    Args:
        adata: annotated data, dense or sparse, in memory, backed or read lazily.
        method: "shared_flow" or "per_gene".
        preset: "paper" or "circulating", settings of "per_gene".
        options: settings: `SharedFlowOptions`, or `VelocityOptions` for "per_gene".
        vkey: name of the result.
        ukey, xkey: layers of moments of unspliced and spliced abundance.
        copy: return a copy with the result and leave adata unchanged.

    Returns:
        None, or the copy.

    Raises:
        KeyError: a layer or the graph of neighbors is missing.
        ValueError, TypeError: too few cells, no gene that can be fitted, negative counts, a graph of other cells, a
            name that would overwrite the layers, or an argument of wrong type or value.
        fluxmatching.TrainingError: the loss of "per_gene" is not finite.
    """
    check_choice(FUNCTION, "method", method, METHODS)
    if method == "per_gene":
        settings: Any = _per_gene_options(preset, options)
        check_arguments(adata, (vkey, ukey, xkey), copy)
        _check_moments(adata, ukey, xkey)
        fit = fit_per_gene(adata, settings, ukey, xkey)
        result = adata.copy() if copy else adata
        delete_results(result, vkey)
        for suffix, values in fit.layers.items():
            result.layers[f"{vkey}{suffix}"] = values
        for name, values in fit.genes.items():
            result.var[f"{vkey}_{name}"] = values
        used = fit.used
    else:
        settings = _shared_flow_options(preset, options)
        check_arguments(adata, (vkey, ukey, xkey), copy, settings)
        sources = read_sources(FUNCTION, adata, settings, ukey, xkey)
        shared = fit_sources(sources, settings)
        result = adata.copy() if copy else adata
        write_shared_flow(result, vkey, shared, sources if settings.keep_moments else None)
        used = {name: value for name, value in asdict(settings).items() if value is not None}
    result.uns[f"{vkey}_params"] = {"mode": "flux", "method": method, "ukey": ukey, "xkey": xkey, **used}
    return result if copy else None


def delete_results(result: AnnData, vkey: str) -> None:
    """Delete what an earlier fit of either method has written under a name: none of it belongs to the new one."""
    for mapping, suffixes in (
        (result.layers, ("", "_u", "_alpha")),
        (result.var, ("_gamma", "_beta", "_genes", "_rate", "_agreement", "_fitted", "_a", "_b", "_c", "_scale")),
        (result.obs, ("_spread",)),
        (result.obsm, ("_flow",)),
        (result.varm, ("_flow",)),
    ):
        for suffix in suffixes:
            if f"{vkey}{suffix}" in mapping:
                del mapping[f"{vkey}{suffix}"]


def write_shared_flow(result: AnnData, vkey: str, fit: SharedFlow, sources: Sources | None) -> None:
    """Write a shared flow into annotated data, and the moments that it lacked if the sources are given."""
    for key, columns in ({} if sources is None else sources.missing).items():
        result.layers[key] = dense(columns)
    if (left_out := np.isnan(fit.velocity[0]).sum()) > 0:
        warnings.warn(
            f"flux_velocity: {left_out} of {fit.velocity.shape[1]} genes have spliced abundances that are not finite; "
            f"they are left out, and their velocity is NaN",
            stacklevel=3,
        )
    delete_results(result, vkey)
    result.layers[vkey] = fit.velocity
    result.obsm["X_flow"], result.obsm[f"{vkey}_flow"] = fit.position, fit.flow
    result.varm[f"{vkey}_flow"] = np.ascontiguousarray(fit.directions.T)
    if fit.spread is not None:
        result.obs[f"{vkey}_spread"] = fit.spread
    by_gene = {"gamma": fit.ratio, "beta": np.where(np.isnan(fit.ratio), np.nan, 1.0), "rate": fit.rate}
    by_gene |= {"agreement": fit.agreement, "fitted": fit.fitted, "genes": fit.velocity_genes}
    for name, values in by_gene.items():
        result.var[f"{vkey}_{name}"] = values


def _per_gene_options(preset: str | None, options: Any) -> VelocityOptions:
    if options is None:
        return VelocityOptions.from_preset("paper" if preset is None else preset)
    if preset is not None:
        raise ValueError(
            f"flux_velocity: give preset or options, not both; VelocityOptions.from_preset({preset!r}, ...) changes "
            f"settings of a preset"
        )
    if not isinstance(options, VelocityOptions):
        raise TypeError(f'flux_velocity: with method="per_gene" options must be VelocityOptions, got {options!r}')
    return options


def _shared_flow_options(preset: str | None, options: Any) -> SharedFlowOptions:
    if preset is not None:
        raise ValueError(f'flux_velocity: preset {preset!r} is one of method="per_gene"; "shared_flow" has no presets')
    if options is None:
        return SharedFlowOptions()
    if not isinstance(options, SharedFlowOptions):
        raise TypeError(f'flux_velocity: with method="shared_flow" options must be SharedFlowOptions, got {options!r}')
    return options


def check_arguments(
    adata: AnnData, keys: tuple[str, str, str], copy: bool, options: SharedFlowOptions | None = None
) -> None:
    """Check the arguments that all methods share; `keys` are vkey, ukey and xkey."""
    check_annotated(FUNCTION, adata)
    vkey, ukey, xkey = keys
    for name, value in (("vkey", vkey), ("ukey", ukey), ("xkey", xkey)):
        if not isinstance(value, str) or not value:
            raise TypeError(f"flux_velocity: {name} must be a non-empty string, got {value!r}")
    kept = {ukey, xkey, "Mu", "Ms", "unspliced", "spliced"}
    kept |= set() if options is None else {options.counts, options.spliced_counts}
    if overwritten := kept.intersection((vkey, f"{vkey}_u", f"{vkey}_alpha")):
        raise ValueError(f"flux_velocity: vkey {vkey!r} would overwrite the layer {overwritten.pop()!r}")
    if adata.n_obs < 2:
        raise ValueError(f"flux_velocity: adata must have at least two cells, got {adata.n_obs}")
    if not isinstance(copy, bool):
        raise TypeError(f"flux_velocity: copy must be True or False, got {copy!r}")
    if adata.isbacked and (copy or adata.is_view):  # AnnData would refuse at the very end
        raise ValueError("flux_velocity: a copy or a view of data on disk cannot be written; use adata.to_memory()")


def _check_moments(adata: AnnData, ukey: str, xkey: str) -> None:
    for key in (ukey, xkey):
        if key not in adata.layers:
            raise KeyError(
                f"flux_velocity: adata.layers has no {key!r} (it has {sorted(adata.layers)}); "
                f"fluxmatching.velocity.moments(adata) makes Mu and Ms from the layers 'unspliced' and 'spliced'"
            )
