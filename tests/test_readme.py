"""Every Python block of the README runs as it stands, in a fresh interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2


# What a reader of the block on RNA velocity has before it: cells with moments and an embedding.
CELLS = """
import scanpy, scvelo
adata = scvelo.datasets.simulation(n_obs=120, n_vars=8)
scanpy.pp.pca(adata)
scanpy.pp.neighbors(adata)
scvelo.pp.moments(adata, n_neighbors=None, n_pcs=None)
scanpy.tl.umap(adata)
"""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1])
def test_block_runs(block: str, tmp_path: Path) -> None:
    if "scvelo" in block:
        pytest.importorskip("scvelo", reason="scvelo is not installed: pip install 'fluxkernels[rna]'")
        block = CELLS + block
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [t for t in targets if not (README.parent / t).exists()] == []
