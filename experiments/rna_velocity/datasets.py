"""The data sets by name: their files, known facts about their cells, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.data import VARIABLE, data_folders
from experiments.common.registry import UsageError
from experiments.rna_velocity.preparation import NEIGHBORS, dense, normalize_totals, prepare

if TYPE_CHECKING:
    from anndata import AnnData

MIN_SHARED_COUNTS = 20
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


PANCREAS_EDGES = (
    ("Ductal", "Ngn3 low EP"),
    ("Ngn3 low EP", "Ngn3 high EP"),
    ("Ngn3 high EP", "Pre-endocrine"),
    ("Pre-endocrine", "Alpha"),
    ("Pre-endocrine", "Beta"),
    ("Pre-endocrine", "Delta"),
    ("Pre-endocrine", "Epsilon"),
)

DATASETS = {
    "pancreas": Dataset(
        "pancreas/endocrinogenesis_day15_2000genes.h5ad",
        "scvelo.datasets.pancreas(), or a file with its 3696 cells",
        "pancreas",
        "clusters",
        PANCREAS_EDGES,
        {"flux": (0.202, 0.972), "dynamical": (0.330, 0.821)},
        preselected=True,
    ),
    "gastrulation_erythroid": Dataset(
        "gastrulation/erythroid_lineage.h5ad",
        "scvelo.datasets.gastrulation_erythroid(), the erythroid lineage of Pijuan-Sala et al. 2019",
        "gastrulation_erythroid",
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
    "pancreas_739": Dataset(
        "pancreas/pancreas_739cells_7192genes.h5ad",
        "data/pancreas.rda of the repository JEFworks-Lab/veloviz: 739 cells of the pancreas with 7192 genes",
        None,
        "clusters",
        PANCREAS_EDGES,
        {},
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
    except ImportError as error:
        raise UsageError(
            f"no file of {name}, and scVelo, which downloads it, is not installed: pip install 'fluxkernels[scvelo]', "
            f"or fetch it elsewhere ({dataset.source}) and {place}"
        ) from error
    except Exception as error:  # whatever a download raises
        raise UsageError(
            f"{name} could not be downloaded ({type(error).__name__}: {error}); fetch it elsewhere "
            f"({dataset.source}) and {place}"
        ) from error


def _scvelo(loader: str) -> AnnData:
    import scvelo

    return getattr(scvelo.datasets, loader)()


def preprocess(adata: AnnData, dataset: Dataset, genes: int, seed: int) -> None:
    """Select genes, normalize, find neighbors, compute moments, and make an embedding if there is none, in place.

    A file of selected genes keeps all of them, even those with few counts: its authors had their own rule. Other files
    need scanpy, for the selection and the embedding.

    Raises:
        UsageError: scanpy is needed and not installed.
    """
    if not (dataset.preselected and adata.n_vars <= genes):  # unlike a file, the download has all genes
        select_genes(adata, genes)
    prepare(adata)
    if "X_umap" not in adata.obsm:
        sc = _scanpy()
        sc.pp.neighbors(adata, NEIGHBORS, use_rep="X_pca", key_added="embedding", random_state=seed)
        sc.tl.umap(adata, random_state=seed, neighbors_key="embedding")


def select_genes(adata: AnnData, genes: int) -> None:
    """Keep the genes that vary most among those with counts, in place, as the paper's pipeline does (B.2).

    Genes with fewer than 20 counts in cells where they have both spliced and unspliced counts are dropped first. Those
    that vary most are scanpy's "seurat" choice on log1p of normalized spliced counts.
    """
    sc = _scanpy()
    spliced, unspliced = (dense(adata.layers[key]) for key in ("spliced", "unspliced"))
    shared = ((spliced + unspliced) * ((spliced > 0) & (unspliced > 0))).sum(0)
    adata._inplace_subset_var(shared >= MIN_SHARED_COUNTS)
    if adata.n_vars > genes:
        adata.X = np.log1p(normalize_totals(dense(adata.layers["spliced"]))).astype(np.float32)
        sc.pp.highly_variable_genes(adata, n_top_genes=genes, flavor="seurat", subset=True)


def _scanpy() -> Any:
    try:
        import scanpy
    except ImportError as error:
        raise UsageError("this data set needs scanpy: pip install 'fluxkernels[rna]'") from error
    return scanpy


def subsample(adata: AnnData, cells: int, seed: int) -> AnnData:
    """Choose at most `cells` cells at random; keep their order."""
    if adata.n_obs <= cells:
        return adata
    chosen = np.sort(np.random.default_rng(seed).choice(adata.n_obs, cells, replace=False))
    result: Any = adata[chosen].copy()
    return result
