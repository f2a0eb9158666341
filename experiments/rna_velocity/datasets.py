"""The five data sets by name: where their files are, what is known about their cells, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.data import VARIABLE, data_folders
from experiments.common.registry import UsageError

if TYPE_CHECKING:
    from anndata import AnnData

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
        file: below the data folder.
        source: where the file is from, for a reader who has to fetch it.
        loader: name in `scvelo.datasets`, which downloads; None where there is none.
        clusters: column of obs.
        edges: known transitions between clusters.
        paper: (CBC, consistency) in the paper's Figure 5, by method.
        preselected: whether the file holds chosen genes only.
        fitted: whether the file holds moments and velocities of scVelo's dynamical model already, a reference.
    """

    file: str
    source: str
    loader: str | None
    clusters: str
    edges: Edges
    paper: dict[str, tuple[float, float]]
    preselected: bool = False
    fitted: bool = False


DATASETS = {
    "pancreas": Dataset(
        "pancreas/endocrinogenesis_day15_2000genes.h5ad",
        "scvelo.datasets.pancreas(), or a file with its 3696 cells",
        "pancreas",
        "clusters",
        (
            ("Ductal", "Ngn3 low EP"),
            ("Ngn3 low EP", "Ngn3 high EP"),
            ("Ngn3 high EP", "Pre-endocrine"),
            ("Pre-endocrine", "Alpha"),
            ("Pre-endocrine", "Beta"),
            ("Pre-endocrine", "Delta"),
            ("Pre-endocrine", "Epsilon"),
        ),
        {"flux": (0.202, 0.972), "dynamical": (0.330, 0.821)},
        preselected=True,
    ),
    "gastrulation": Dataset(
        "gastrulation/gastrulation.h5ad",
        "scvelo.datasets.gastrulation(), about 9 GB",
        "gastrulation",
        "celltype",
        (
            ("Blood progenitors 1", "Blood progenitors 2"),
            ("Blood progenitors 2", "Erythroid1"),
            ("Erythroid1", "Erythroid2"),
            ("Erythroid2", "Erythroid3"),
        ),
        {"flux": (0.611, 0.991), "dynamical": (-0.639, 0.877)},
    ),
    "dentate_gyrus": Dataset(
        "dentategyrus/10X43_1.h5ad",
        "scvelo.datasets.dentategyrus()",
        "dentategyrus",
        "clusters",
        (
            ("nIPC", "Neuroblast"),
            ("Neuroblast", "Granule immature"),
            ("Granule immature", "Granule mature"),
            ("OPC", "OL"),
        ),
        {"flux": (0.284, 0.981), "dynamical": (-0.084, 0.791)},
    ),
    "bone_marrow": Dataset(
        "bonemarrow/human_cd34_bone_marrow.h5ad",
        "scvelo.datasets.bonemarrow()",
        "bonemarrow",
        "clusters",
        (("HSC_1", "HSC_2"), ("HSC_1", "Ery_1"), ("Ery_1", "Ery_2")),
        {"flux": (0.177, 0.939), "dynamical": (-0.789, 0.857)},
    ),
    "hindbrain": Dataset(
        "hindbrain/hindbrain.h5ad",
        "the GABAergic and glial lineage of the developing mouse hindbrain (Vladoiu et al. 2019)",
        None,
        "Celltype",
        (
            ("Neural stem cells", "Proliferating VZ progenitors"),
            ("Proliferating VZ progenitors", "VZ progenitors"),
            ("VZ progenitors", "Gliogenic progenitors"),
            ("VZ progenitors", "Differentiating GABA interneurons"),
            ("Differentiating GABA interneurons", "GABA interneurons"),
        ),
        {"flux": (0.345, 0.897), "dynamical": (0.332, 0.874)},
    ),
    "dentate_gyrus_fitted": Dataset(
        "dentategyrus/dentategyrus_200cells_scvelo_dynamical.h5ad",
        "tests/_ground_truth_adatas/adata_200.h5ad of the repository theislab/cellrank",
        None,
        "clusters",
        (("nIPC", "Neuroblast"), ("Neuroblast", "Granule immature"), ("Granule immature", "Granule mature")),
        {},
        fitted=True,
    ),
}


def load(name: str, download: Callable[[str], AnnData] | None = None) -> AnnData:
    """Raw counts of a data set, from its file or else from scVelo's loader.

    Args:
        name: of a data set.
        download: takes a loader's name; None for scVelo's.

    Raises:
        UsageError: there is no file and nothing to download; the text says what to put where.
    """
    import anndata

    dataset = DATASETS[name]
    for folder in data_folders():
        if (folder / dataset.file).exists():
            return anndata.read_h5ad(folder / dataset.file)
    place = f"put it at {Path('data') / dataset.file}, or below a folder named by {VARIABLE}"
    if dataset.loader is None:
        raise UsageError(f"no file of {name}: it is {dataset.source}; {place}")
    try:
        return (download or _scvelo)(dataset.loader)
    except Exception as error:  # whatever a download raises
        raise UsageError(
            f"{name} could not be downloaded ({type(error).__name__}: {error}); fetch it elsewhere "
            f"({dataset.source}) and {place}"
        ) from error


def _scvelo(loader: str) -> AnnData:
    import scvelo

    return getattr(scvelo.datasets, loader)()


def preprocess(adata: AnnData, dataset: Dataset, genes: int, seed: int) -> None:
    """The paper's pipeline (B.2), in place: selection, normalisation, neighbours, moments; an embedding if it has none.

    A file of chosen genes keeps them all, those with few counts too: somebody chose them by a rule of their own.
    """
    import scanpy as sc
    import scvelo as scv

    chosen = dataset.preselected and adata.n_vars <= genes  # the download has all genes, whatever a file has
    sc.pp.filter_cells(adata, min_counts=1)
    scv.pp.filter_and_normalize(adata, min_shared_counts=None if chosen else 20)
    # scVelo did this in that function up to 0.2; gene selection and neighbours suppose it.
    sc.pp.log1p(adata)
    if adata.n_vars > genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=genes, flavor="seurat", subset=True)
    sc.pp.pca(adata, n_comps=min(50, adata.n_vars - 1, adata.n_obs - 1), random_state=seed)
    neighbours = {"n_pcs": min(30, adata.obsm["X_pca"].shape[1]), "n_neighbors": min(30, adata.n_obs // 2)}
    sc.pp.neighbors(adata, **neighbours, random_state=seed)
    scv.pp.moments(adata, n_neighbors=None, n_pcs=None)
    if "X_umap" not in adata.obsm:
        sc.tl.umap(adata, random_state=seed)


def subsample(adata: AnnData, cells: int, seed: int) -> AnnData:
    """At most so many cells, chosen at random."""
    if adata.n_obs <= cells:
        return adata
    chosen = np.sort(np.random.default_rng(seed).choice(adata.n_obs, cells, replace=False))
    result: Any = adata[chosen].copy()
    return result
