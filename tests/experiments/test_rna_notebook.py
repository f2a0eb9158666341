"""Run of the notebook on a part of the cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common.data import VARIABLE, data_folders
from experiments.rna_velocity.datasets import DATASETS

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[test]'")

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "rna_velocity" / "pancreas.ipynb"
CELLS = 600


@pytest.fixture(scope="module")
def cells() -> Any:
    """A part of the pancreas."""
    file = DATASETS["pancreas"].file
    found = [folder / file for folder in data_folders() if (folder / file).exists()]
    if not found:
        pytest.skip(f"no file of the pancreas, {file}, in a data folder (see experiments/rna_velocity/README.md)")
    adata = anndata.read_h5ad(found[0])
    return adata[np.random.default_rng(0).choice(adata.n_obs, CELLS, replace=False)].copy()


def test_notebook_runs(cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / DATASETS["pancreas"].file
    file.parent.mkdir()
    cells.write_h5ad(file)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    sources = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert len(sources) >= 7
    names: dict[str, Any] = {}
    for source in sources[:-1]:
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    adata = names["adata"]
    assert adata.n_obs == CELLS
    assert adata.obs["velocity_spread"].between(0, 1).all()
    assert np.isfinite(adata.obsm["velocity_umap"]).all()
    assert names["flow"].mean_over_edges > 0.2  # a part of the cells is enough for the main direction
    pytest.importorskip("cellrank", reason="cellrank is not installed, which the last cell needs: pip install cellrank")
    exec(compile(sources[-1], str(NOTEBOOK), "exec"), names)
    assert names["fates"].sum() == pytest.approx(1)
    assert names["fates"].idxmax() not in ("Ductal", "Ngn3 low EP")
