"""Folders in which data files are searched for."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "FLUXMATCHING_DATA"


def data_folders() -> list[Path]:
    """Return the variable's folder, `data` here, and `shared/data` beside the checkout, in this order."""
    named = [Path(os.environ[VARIABLE])] if VARIABLE in os.environ else []
    return [*named, Path("data"), Path(__file__).parents[3] / "shared" / "data"]
