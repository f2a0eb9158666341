"""Settings of an RNA velocity fit."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fluxkernels.backend import check_backend
from fluxkernels.checks import check_choice, check_positive, check_seed

# What differs from the paper's settings in a fit whose directions and ratios of rates are meaningful.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "circulating": {"scale": True, "circulation": 10.0, "sigma": math.sqrt(0.05), "lr": 0.01, "iterations": 280},
}


@dataclass(frozen=True, kw_only=True)
class VelocityOptions:
    """Settings of `flux_velocity` with method "per_gene". The defaults are the paper's (Table 2).

    Construction checks them.

    Main:
        epochs: passes over all cells; 0 writes the field at the start.
        iterations: minibatches, in place of epochs.
        sigma: σ of the density estimates, in units of the layers, or of k with `scale`.
        lr: learning rate of Adam.
        scale: measure each gene in units of the standard deviation k of its spliced abundance.
        circulation: R of `SplicingField.circulate`, where the fit then starts; needs abundances ≥ 0. None starts with
            a = b = c = 0 and β = γ = log 2.
        seed: determines minibatches and chains.

    Other:
        batch_size: cells per minibatch; all cells if there are fewer.
        device: where to train; None takes a GPU if there is one.
        backend: "torch", "cpu", "triton", or None for the automatic choice.
        progress: whether to show a bar.

    Raises:
        ValueError, TypeError: a value out of its range; the message names it.
    """

    epochs: int = 100
    iterations: int | None = None
    batch_size: int = 256
    sigma: float = math.sqrt(1e-3)
    lr: float = 1e-3
    scale: bool = False
    circulation: float | None = None
    seed: int = 0
    device: str | torch.device | None = None
    backend: str | None = None
    progress: bool = True

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> VelocityOptions:
        """Return the options of preset "paper" or "circulating", with some changed."""
        check_choice("flux_velocity", "preset", preset, tuple(PRESETS))
        return cls(**(PRESETS[preset] | changes))

    def __post_init__(self) -> None:
        # Python's own numbers, which files of AnnData and checkpoints can hold.
        for name, least in (("epochs", 0), ("iterations", 0), ("batch_size", 2)):
            if (value := getattr(self, name)) is None and name == "iterations":
                continue
            object.__setattr__(self, name, _whole(name, value, least))
        for name in ("scale", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"flux_velocity: {name} must be True or False, got {getattr(self, name)!r}")
        for name in ("sigma", "lr", *(() if self.circulation is None else ("circulation",))):
            object.__setattr__(self, name, check_positive("flux_velocity", name, getattr(self, name)))
        if self.backend is not None:
            check_backend(self.backend, "flux_velocity: backend")
        object.__setattr__(self, "seed", _seed(self.seed))


def _whole(name: str, value: Any, least: int) -> int:
    """Convert a whole number that is not below `least`."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"flux_velocity: {name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool) or whole < least:
        raise ValueError(f"flux_velocity: {name} must be a whole number, at least {least}, got {value!r}")
    return whole


@dataclass(frozen=True, kw_only=True)
class SharedFlowOptions:
    """Settings of `flux_velocity` with method "shared_flow". Construction checks them.

    Main:
        bootstraps: replicates of the bootstrap of genes, which gives the spread of each cell's direction; 0 for none.
        neighbors: graph of neighbors: an entry of `adata.uns` as `scanpy.pp.neighbors(key_added=...)` writes it, or a
            graph of connectivities in `adata.obsp`; None takes scanpy's default.
        counts: layer of unspliced counts.
        spliced_counts: layer of spliced counts, read only if the moments are missing.
        keep_moments: whether to write moments that were missing, which scVelo's and CellRank's functions need.
        seed: determines folds and bootstrap.

    Other:
        dimensions: largest number of directions of the state.
        ridge: ε of the restriction to the cells; small values remove what lies across the cells more strictly.
        rounds: times that the flow is computed.
        folds: parts of the genes; a gene's rates are regressed on the flow of the other parts.
        weight: number of independent cells that a gene's regression counts as, against the prior of its ratio.
        ratio_spread: standard deviation of that prior of log(γ/β) about its start.
        least_correlation: genes whose counts correlate less with those of neighboring cells do not make the flow.
        least_agreement: genes with a smaller R² keep their start.
        smooth_kinetics: whether the kinetics that make the flow are of abundances averaged over neighbors once more, as
            in the regressions. That costs detail where branches meet.

    Raises:
        ValueError, TypeError: a value out of its range; the message names it.
    """

    bootstraps: int = 16
    neighbors: str | None = None
    counts: str = "unspliced"
    spliced_counts: str = "spliced"
    keep_moments: bool = True
    seed: int = 0
    dimensions: int = 30
    ridge: float = 0.1
    rounds: int = 4
    folds: int = 5
    weight: float = 20.0
    ratio_spread: float = 0.1
    least_correlation: float = 0.1
    least_agreement: float = 0.5
    smooth_kinetics: bool = False

    def __post_init__(self) -> None:
        for name, least in (("bootstraps", 0), ("dimensions", 1), ("rounds", 1), ("folds", 2)):
            object.__setattr__(self, name, _whole(name, getattr(self, name), least))
        for name in ("ridge", "weight", "ratio_spread"):
            object.__setattr__(self, name, check_positive("flux_velocity", name, getattr(self, name)))
        for name in ("least_correlation", "least_agreement"):
            object.__setattr__(self, name, _fraction(name, getattr(self, name)))
        for name in ("keep_moments", "smooth_kinetics"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"flux_velocity: {name} must be True or False, got {getattr(self, name)!r}")
        for name in ("neighbors", "counts", "spliced_counts"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "neighbors" and value is None):
                raise TypeError(f"flux_velocity: {name} must be a non-empty string, got {value!r}")
        object.__setattr__(self, "seed", _seed(self.seed))


def _fraction(name: str, value: Any) -> float:
    """Convert a number in [-1, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"flux_velocity: {name} must be a number, got {value!r}")
    if not -1 <= value <= 1:
        raise ValueError(f"flux_velocity: {name} must lie in [-1, 1], got {value!r}")
    return float(value)


def _seed(value: Any) -> int:
    """Convert a seed that Python's and NumPy's generators take."""
    seed = check_seed("flux_velocity", value)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"flux_velocity: seed must be a whole number in [0, 2^63), got {value!r}")
    return seed
