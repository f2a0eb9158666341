"""The data sets by name: their files, known facts about their cells, and the paper's numbers."""

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
        file: path below the data folder.
        source: origin of the file, for users without the file.
        loader: name of the download function in `scvelo.datasets`; None if there is none.
        clusters: column of obs with the clusters.
        edges: known transitions between clusters.
        paper: (CBC, consistency) in the paper's Figure 5, by method.
        preselected: whether the file holds selected genes only.
        fitted: whether the file already holds moments and velocities of scVelo's dynamical model, as a reference.
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
    """Load raw counts of a data set from its file, or else through scVelo's loader.

    Args:
        name: name of a data set.
        download: function of a loader's name; None for scVelo's.

    Raises:
        UsageError: there is no file and nothing to download; the text explains which file to put where.
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
    """Apply the paper's pipeline (B.2) in place: selection, normalization, neighbors, moments; an embedding if missing.

    A file of selected genes keeps all of them, even those with few counts: its authors had their own rule.
    """
    import scanpy as sc
    import scvelo as scv

    chosen = dataset.preselected and adata.n_vars <= genes  # unlike a file, the download has all genes
    sc.pp.filter_cells(adata, min_counts=1)
    scv.pp.filter_and_normalize(adata, min_shared_counts=None if chosen else 20)
    # scVelo up to 0.2 did this in `filter_and_normalize`; gene selection and neighbors expect it.
    sc.pp.log1p(adata)
    if adata.n_vars > genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=genes, flavor="seurat", subset=True)
    sc.pp.pca(adata, n_comps=min(50, adata.n_vars - 1, adata.n_obs - 1), random_state=seed)
    neighbors = {"n_pcs": min(30, adata.obsm["X_pca"].shape[1]), "n_neighbors": min(30, adata.n_obs // 2)}
    sc.pp.neighbors(adata, **neighbors, random_state=seed)
    scv.pp.moments(adata, n_neighbors=None, n_pcs=None)
    if "X_umap" not in adata.obsm:
        sc.tl.umap(adata, random_state=seed)


def subsample(adata: AnnData, cells: int, seed: int) -> AnnData:
    """Choose at most `cells` cells at random; keep their order."""
    if adata.n_obs <= cells:
        return adata
    chosen = np.sort(np.random.default_rng(seed).choice(adata.n_obs, cells, replace=False))
    result: Any = adata[chosen].copy()
    return result
