"""The splicing model of every gene by itself, fitted by Flux Matching (Sec. 4.2, B.2)."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fluxkernels import resolve_backend
from fluxmatching.losses.modules import LossModule
from fluxmatching.training import Trainer, TrainingOptions
from fluxmatching.velocity.layers import in_memory
from fluxmatching.velocity.model import SPLICED, UNSPLICED, SplicingField, splicing_loss
from fluxmatching.velocity.options import VelocityOptions

if TYPE_CHECKING:
    from anndata import AnnData

# Standard deviations that can be fitted: their fourth powers and those of their inverses must be float32 numbers.
SPREADS = (1e-9, 1e6)


@dataclass(frozen=True)
class PerGeneFit:
    """Result of `fit_per_gene`.

    Attributes:
        layers: ds/dt, du/dt and α of every cell and gene by the suffixes "", "_u" and "_alpha" of their layers; NaN in
            genes that were left out.
        genes: values per gene by the name of their column: "a", "b", "c" of α = k softplus((a u + b s)/k + c),
            "scale" k, rates "beta" and "gamma", and whether it was fitted, "genes".
        used: settings, with the backend and the device.
    """

    layers: dict[str, np.ndarray]
    genes: dict[str, np.ndarray]
    used: dict[str, Any]


def fit_per_gene(adata: AnnData, options: VelocityOptions, ukey: str, xkey: str) -> PerGeneFit:
    """Fit the splicing model of every gene by Flux Matching.

    One `SplicingField` for all genes is trained on minibatches of cells. The density estimate is a separate one in the
    plane (u, s) of each gene. Time is such that cells diffuse by dx = f dt + √2 dW, or by dx = f dt + k √2 dW with
    `scale`. For one gene the direction in (u, s) and γ/β are meaningful. The speed relative to other genes follows from
    the assumed noise: without `scale`, genes with a small spread are fast; with it, all are comparable.

    Preset "paper", the default, has the settings of the paper (Table 2, read as 100 epochs; no batch size is given). A
    fit then stays near its start, α constant and β = γ, because a gene whose spread is d needs rates of the order 1/d²
    and Adam moves a parameter by about lr per step. The velocities are smooth, and their directions nearly those of
    u - s.

    Preset "circulating" measures each gene in units of its own spread and starts where γ/β = ū/s̄ and flow outweighs
    diffusion. That start suits genes whose whole cycle (on, off, decay) is in the data; training corrects it for
    others. experiments/rna_velocity/README.md compares it with known rates.

    Args:
        adata: with the layers `ukey` and `xkey`, moments of unspliced and spliced abundance.
        options: settings.
        ukey, xkey: names of the layers.

    Raises:
        ValueError: no gene can be fitted.
        fluxmatching.TrainingError: the loss is not finite.
    """
    device = _device(options.device)
    backend = resolve_backend(options.backend, device)
    unspliced, spliced = (in_memory("flux_velocity", f"layers[{key!r}]", adata.layers[key]) for key in (ukey, xkey))
    genes = _genes(unspliced, spliced)
    if options.circulation is not None and genes.least < 0:
        raise ValueError(f"flux_velocity: with circulation abundances must be at least 0, got {genes.least:g}")
    unit = genes.spread[SPLICED, genes.fitted] if options.scale else np.ones(genes.fitted.sum(), dtype=np.float32)
    cells = _Cells(unspliced, spliced, np.flatnonzero(genes.fitted), unit)

    with device:  # not the default device
        field = SplicingField(len(cells.genes))
    if options.circulation is not None:
        means = torch.from_numpy(genes.mean[:, genes.fitted] / unit)
        field.circulate(means.T.to(device), options.circulation)
    _train(field, cells, options)

    velocity, velocity_u, alpha = _evaluate(field, cells, len(genes.fitted))
    rates = {name: getattr(field, name).detach().cpu().numpy() for name in ("a", "b", "c", "beta", "gamma")}
    by_gene = {name: _among_all(values, genes.fitted) for name, values in (rates | {"scale": unit}).items()}
    # Files of AnnData take no None.
    used = {name: value for name, value in asdict(options).items() if value is not None and name != "progress"}
    used |= {"backend": backend, "device": str(device)}
    return PerGeneFit({"": velocity, "_u": velocity_u, "_alpha": alpha}, by_gene | {"genes": genes.fitted}, used)


def _device(device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"flux_velocity: device {str(chosen)!r}: PyTorch finds no GPU here")
    return chosen


class _Cells:
    """Cells of two layers as samples `[n, G, 2]` in units of `unit`, made on access: the layers are not copied."""

    def __init__(self, unspliced: Any, spliced: Any, genes: np.ndarray, unit: np.ndarray) -> None:
        self.layers, self.genes, self.unit = (unspliced, spliced), genes, unit

    def __len__(self) -> int:
        return int(self.layers[0].shape[0])

    def __getitem__(self, cells: Tensor) -> Tensor:
        rows = cells.numpy()
        chosen = [_dense(layer[rows])[:, self.genes] / self.unit for layer in self.layers]
        return torch.stack([torch.from_numpy(values) for values in chosen], -1)


def _dense(layer: Any) -> np.ndarray:
    return np.asarray(layer.toarray() if hasattr(layer, "toarray") else layer, dtype=np.float32)


@dataclass
class _Genes:
    """Statistics of the genes before a fit.

    Attributes:
        fitted: whether a gene varies in both layers and is finite, `[genes]`.
        mean, spread: mean and standard deviation, `[2, genes]`.
        least: smallest abundance in genes that are fitted.
    """

    fitted: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    least: float


def _genes(*layers: Any) -> _Genes:
    """Compute statistics of both layers; a warning counts the genes that cannot be fitted."""
    genes = layers[0].shape[1]
    mean, spread, least = (np.empty((2, genes), dtype=np.float32) for _ in range(3))
    with np.errstate(invalid="ignore", over="ignore"):  # infinite and huge values, which are left out below
        for row, layer in enumerate(layers):
            for start in range(0, genes, 256):  # a whole layer as float32 could be gigabytes
                columns = slice(start, start + 256)
                block = _dense(layer[:, columns])
                mean[row, columns], spread[row, columns] = block.mean(0, dtype=float), block.std(0, dtype=float)
                least[row, columns] = block.min(0)
    # NaN is in no range.
    fitted = np.logical_and.reduce((spread > SPREADS[0]) & (spread < SPREADS[1]))
    if not fitted.any():
        raise ValueError("flux_velocity: no gene varies in both layers with finite values")
    if not fitted.all():
        warnings.warn(
            f"flux_velocity: {np.sum(~fitted)} of {genes} genes are constant or not finite in a layer, or vary by more "
            f"than {SPREADS[1]:g}; they are left out, and their velocity is NaN",
            stacklevel=3,
        )
    return _Genes(fitted, mean, spread, float(least[:, fitted].min()))


class SplicingLoss(LossModule):
    """Mean of `splicing_loss` over a minibatch, as a module.

    Args:
        field, sigma, backend: as in `splicing_loss`.
    """

    field: SplicingField

    def __init__(self, field: SplicingField, sigma: float, backend: str | None = None) -> None:
        super().__init__(field)
        self.sigma, self.backend = sigma, backend

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss `[]` and {"loss"}; x is `[n, G, 2]`, and seed determines the chains."""
        loss = splicing_loss(self.field, x, self.sigma, seed=self.key(x, seed), backend=self.backend).mean()
        return loss, {"loss": loss.detach()}


def _train(field: SplicingField, cells: _Cells, options: VelocityOptions) -> None:
    batch_size = min(options.batch_size, len(cells))
    iterations = options.iterations
    if iterations is None:
        iterations = options.epochs * (len(cells) // batch_size)
    if iterations == 0:
        return

    training = TrainingOptions(
        iterations, batch_size, lr=options.lr, optimizer="adam", ema=0.0, clip=None, seed=options.seed,
        accelerator=str(field.a.device), progress=options.progress,
    )  # fmt: skip
    Trainer(SplicingLoss(field, options.sigma, options.backend), cells, training).run()


def _evaluate(field: SplicingField, cells: _Cells, genes: int) -> list[np.ndarray]:
    """Return ds/dt, du/dt and α in units of the layers, each `[cells, genes]`, NaN in genes that were not fitted."""
    found = [np.full((len(cells), genes), np.nan, dtype=np.float32) for _ in range(3)]
    device = field.a.device
    with torch.no_grad():
        for rows in torch.arange(len(cells), device="cpu").split(1024):
            x = cells[rows].to(device)
            velocity = field(x)
            parts = velocity[..., SPLICED], velocity[..., UNSPLICED], field.transcription(x)
            for values, part in zip(found, parts, strict=True):
                values[np.ix_(rows.numpy(), cells.genes)] = part.cpu().numpy() * cells.unit
    return found


def _among_all(values: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Place the values of some genes among all genes, with NaN elsewhere."""
    everywhere = np.full(len(genes), np.nan, dtype=np.float32)
    everywhere[genes] = values
    return everywhere
