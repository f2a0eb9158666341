"""RNA velocity: the splicing model fitted by Flux Matching, in scVelo's conventions (Sec. 4.2, B.2).

>>> import scvelo as scv                                        # doctest: +SKIP
>>> from fluxmatching.velocity import flux_velocity
>>> flux_velocity(adata)                                        # doctest: +SKIP
>>> scv.tl.velocity_graph(adata)                                # doctest: +SKIP
>>> scv.pl.velocity_embedding_stream(adata)                     # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkernels import resolve_backend
from fluxkernels.checks import check_positive
from fluxmatching.losses import flux_target
from fluxmatching.training import Trainer, TrainingOptions

if TYPE_CHECKING:
    from anndata import AnnData

UNSPLICED, SPLICED = 0, 1  # of the last dimension

# Arguments of `flux_velocity` for a fit whose directions and ratios of rates can be read, see there.
CIRCULATING: dict[str, Any] = {"scale": True, "circulation": 10.0, "sigma2": 0.05, "lr": 0.01}


class SplicingField(nn.Module):
    """du/dt = α - β u, ds/dt = β u - γ s for each gene, α = softplus(a u + b s + c) (Eq. 41, 42).

    It is element-wise in cells and genes, so its second derivatives are known: it is a
    `fluxmatching.endpoint.ClosedForm`. β and γ are softplus of the parameters `splicing` and `degradation`, in units of
    the inverse of the model's time; α has the unit of u.

    Args:
        genes: G.

    Shape:
        x `[n, G, 2]`, unspliced and spliced abundance; returns the same.
    """

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.splicing, self.degradation = (nn.Parameter(torch.zeros(genes)) for _ in range(5))

    @property
    def beta(self) -> Tensor:
        """β, `[G]`."""
        return F.softplus(self.splicing)

    @property
    def gamma(self) -> Tensor:
        """γ, `[G]`."""
        return F.softplus(self.degradation)

    @torch.no_grad()
    def circulate(self, means: Tensor, rate: float) -> None:
        """Set the parameters to a field in which cells turn about their mean (ū, s̄).

        β = R √(s̄/ū) and γ = R √(ū/s̄), so that β ū = γ s̄: the mean of ds/dt over a stationary population is zero. α is
        linear over most cells, with b = -a ū/s̄ and c = β ū, so that the mean of du/dt is zero as well: high above
        the line u/s = ū/s̄, low below it. a = 0.95 (β + γ) leaves a divergence just below zero.

        Args:
            means: ū and s̄, `[G, 2]`, above 0.
            rate: R = √(βγ).
        """
        unspliced, spliced = means.unbind(-1)
        ratio = unspliced / spliced
        beta, gamma = rate / ratio.sqrt(), rate * ratio.sqrt()
        for parameter, value in ((self.splicing, beta), (self.degradation, gamma)):
            parameter.copy_(value + torch.log(-torch.expm1(-value)))  # the inverse of softplus
        self.a.copy_(0.95 * (beta + gamma))
        self.b.copy_(-self.a * ratio)
        self.c.copy_(beta * unspliced)

    def _drive(self, x: Tensor) -> Tensor:
        """a u + b s + c, `[n, G]`."""
        return self.a * x[..., UNSPLICED] + self.b * x[..., SPLICED] + self.c

    def transcription(self, x: Tensor) -> Tensor:
        """α(u, s), `[n, G]`."""
        return F.softplus(self._drive(x))

    def forward(self, x: Tensor) -> Tensor:
        spliced = self.beta * x[..., UNSPLICED]
        return torch.stack([self.transcription(x) - spliced, spliced - self.gamma * x[..., SPLICED]], -1)

    def endpoint_gradient(self, z: Tensor, score: Tensor, probe: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """See `fluxmatching.endpoint.ClosedForm`."""
        drive = self._drive(z)
        slope = torch.sigmoid(drive)
        bend = slope * (1 - slope)
        beta, gamma, (u, s) = self.beta, self.gamma, score.unbind(-1)
        along = self.a if probe is None else self.a * probe[..., 0].square() + self.b * probe[..., 0] * probe[..., 1]
        # ∇(∇·f) = α'' a (a, b), and J_fᵀ s with J_f = ((α' a - β, α' b), (β, -γ)).
        gradient = torch.stack(
            [
                bend * along * self.a + u * (slope * self.a - beta) + s * beta,
                bend * along * self.b + u * slope * self.b - s * gamma,
            ],
            -1,
        )
        spliced = beta * z[..., UNSPLICED]
        return gradient, torch.stack([F.softplus(drive) - spliced, spliced - gamma * z[..., SPLICED]], -1)


class _Cells:
    """Cells of two layers as samples `[n, G, 2]` in units of `unit`, made when asked for: the layers are not copied."""

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


def flux_velocity(
    adata: AnnData,
    *,
    vkey: str = "velocity",
    ukey: str = "Mu",
    xkey: str = "Ms",
    passes: int = 100,
    batch_size: int = 256,
    sigma2: float = 1e-3,
    lr: float = 1e-3,
    scale: bool = False,
    circulation: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Fit the splicing model of every gene by Flux Matching, and write its velocities where scVelo looks for them.

    One `SplicingField` for all genes is trained on minibatches of cells; the density estimate is a separate one in the
    plane (u, s) of each gene. Rates and velocities are in units of the inverse of a time in which cells diffuse by
    dx = f dt + √2 dW: directions and ratios of rates have a meaning, the common scale has none.

    The defaults are the paper's (Table 2). With them a fit stays near where it starts, α constant and β = γ, because a
    gene whose spread is d needs rates of the order 1/d², and Adam moves a parameter by at most lr a step: the
    velocities are smooth, their directions nearly those of u - s. `flux_velocity(adata, **CIRCULATING)` measures each
    gene in units of its own spread and starts where flow outweighs diffusion; on simulated cells its directions and
    γ/β are as good as those of scVelo's dynamical model (experiments/rna_velocity/README.md).

    Written, and nothing else:

        layers[vkey], layers[vkey + "_u"]    ds/dt and du/dt of every cell and gene; NaN in genes that were left out
        layers[vkey + "_alpha"]              α of every cell and gene
        var[vkey + "_a" / "_b" / "_c"]       of α = k softplus((a u + b s)/k + c)
        var[vkey + "_scale"]                 k, a gene's unit: 1, or the standard deviation of its spliced abundance
        var[vkey + "_beta" / "_gamma"]       rates of splicing and degradation
        var[vkey + "_genes"]                 whether a gene was fitted
        uns[vkey + "_params"]                "mode": "flux", and the arguments

    Args:
        adata: annotated data with the layers `ukey` and `xkey`, as `scv.pp.moments` makes them; dense or sparse.
        vkey: name of the result.
        ukey, xkey: layers of unspliced and spliced abundance.
        passes: over all cells; 0 writes the field at the start.
        batch_size: cells a minibatch; all cells if there are fewer.
        sigma2: σ² of the density estimates, in squared units of the layers, or of k² with `scale`.
        lr: learning rate of Adam.
        scale: measure each gene in units of the standard deviation k of its spliced abundance.
        circulation: R of `SplicingField.circulate`, where the fit then starts; needs abundances ≥ 0. None starts with
            a = b = c = 0 and β = γ = log 2.
        seed: of minibatches and chains.
        device: where to train; None takes a GPU if there is one.
        backend: of the density estimates: "torch", "cpu", "triton", or None for the automatic choice.
        progress: whether to show a bar.
        copy: return a copy with the result, and leave adata as it is.

    Returns:
        None, or the copy.

    Raises:
        KeyError: a layer is missing.
        ValueError: fewer than two cells, no gene that can be fitted, or an argument out of its range.
        fluxmatching.TrainingError: the loss is not finite.
    """
    for key in (ukey, xkey):
        if key not in adata.layers:
            raise KeyError(
                f"flux_velocity: adata.layers has no {key!r} (it has {sorted(adata.layers)}); "
                f"scvelo.pp.moments(adata) makes Mu and Ms from the layers 'unspliced' and 'spliced'"
            )
    if adata.n_obs < 2:
        raise ValueError(f"flux_velocity: adata must have at least two cells, got {adata.n_obs}")
    if passes < 0 or batch_size < 2:
        raise ValueError(f"flux_velocity: passes must be at least 0 and batch_size 2, got {passes} and {batch_size}")
    sigma2 = check_positive("flux_velocity", "sigma2", sigma2)
    if circulation is not None:
        circulation = check_positive("flux_velocity", "circulation", circulation)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    used = resolve_backend(backend, device)
    found = _genes(adata.layers[ukey], adata.layers[xkey])
    if circulation is not None and found.least < 0:
        raise ValueError(f"flux_velocity: with circulation abundances must be at least 0, got {found.least:g}")
    unit = found.spread[SPLICED, found.fitted] if scale else np.ones(found.fitted.sum(), dtype=np.float32)
    cells = _Cells(adata.layers[ukey], adata.layers[xkey], np.flatnonzero(found.fitted), unit)
    batch_size = min(batch_size, len(cells))
    options = TrainingOptions(
        max(1, passes * (len(cells) // batch_size)), batch_size,
        lr=lr, optimizer="adam", ema=0.0, clip=None, seed=seed, progress=progress,
    )  # fmt: skip

    def loss(model: nn.Module, x: Tensor, seed: Tensor) -> Tensor:
        assert isinstance(model, SplicingField)
        target = flux_target(
            model, x, sigma2, grouped=True, endpoint="closed_form", divergence="exact", seed=seed, backend=backend
        )
        # Genes share no parameters; σ⁴ makes the loss independent of σ's unit (the paper's scaling).
        return sigma2**2 * target.loss(model).flatten(1).sum(1)

    field = SplicingField(len(cells.genes)).to(device)
    if circulation is not None:
        means = torch.from_numpy(found.mean[:, found.fitted] / unit)
        field.circulate(means.T.to(device), circulation)
    if passes:
        Trainer(field, loss, cells, options).run()

    layers = _evaluate(field, cells, adata.n_vars)
    result = adata.copy() if copy else adata
    result.layers[vkey], result.layers[f"{vkey}_u"], result.layers[f"{vkey}_alpha"] = layers
    rates = {name: getattr(field, name).detach().cpu().numpy() for name in ("a", "b", "c", "beta", "gamma")}
    for name, values in (rates | {"scale": unit}).items():
        result.var[f"{vkey}_{name}"] = _spread_out(values, found.fitted)
    result.var[f"{vkey}_genes"] = found.fitted
    result.uns[f"{vkey}_params"] = {
        "mode": "flux", "ukey": ukey, "xkey": xkey, "passes": passes, "batch_size": batch_size, "sigma2": sigma2,
        "lr": lr, "scale": scale, "circulation": circulation or 0.0, "seed": seed,
        "backend": used, "device": str(device),
    }  # fmt: skip
    return result if copy else None


@dataclass
class _Genes:
    """What is known of genes before a fit.

    Attributes:
        fitted: whether a gene varies in both layers and is finite, `[genes]`.
        mean, spread: mean and standard deviation, `[2, genes]`.
        least: the smallest abundance in genes that are fitted.
    """

    fitted: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    least: float


def _genes(*layers: Any) -> _Genes:
    """Look at both layers; a warning counts the genes that cannot be fitted."""
    genes = layers[0].shape[1]
    mean, spread, least, most = (np.empty((2, genes), dtype=np.float32) for _ in range(4))
    for row, layer in enumerate(layers):
        for start in range(0, genes, 256):  # a whole layer as float32 could be gigabytes
            columns = slice(start, start + 256)
            block = _dense(layer[:, columns])
            mean[row, columns], spread[row, columns] = block.mean(0, dtype=float), block.std(0, dtype=float)
            least[row, columns], most[row, columns] = block.min(0), block.max(0)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        width = (most - least).min(0)
    # A spread so small that its square is zero in float32 is no spread either.
    fitted = np.isfinite(width) & (width > 0) & (spread.min(0) > 1e-18)
    if not fitted.any():
        raise ValueError("flux_velocity: no gene varies in both layers with finite values")
    if not fitted.all():
        warnings.warn(
            f"flux_velocity: {np.sum(~fitted)} of {genes} genes are constant or not finite in a layer; they are left "
            f"out, and their velocity is NaN",
            stacklevel=3,
        )
    return _Genes(fitted, mean, spread, float(least[:, fitted].min()))


def _spread_out(values: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Values of some genes at their places among all, NaN elsewhere."""
    everywhere = np.full(len(genes), np.nan, dtype=np.float32)
    everywhere[genes] = values
    return everywhere


def _evaluate(field: SplicingField, cells: _Cells, genes: int) -> list[np.ndarray]:
    """ds/dt, du/dt and α in the layers' units, each `[cells, genes]`, NaN in genes that were not fitted."""
    found = [np.full((len(cells), genes), np.nan, dtype=np.float32) for _ in range(3)]
    device = field.a.device
    with torch.no_grad():
        for rows in torch.arange(len(cells)).split(1024):
            x = cells[rows].to(device)
            velocity = field(x)
            for values, part in zip(
                found, (velocity[..., SPLICED], velocity[..., UNSPLICED], field.transcription(x)), strict=True
            ):
                values[np.ix_(rows.numpy(), cells.genes)] = part.cpu().numpy() * cells.unit
    return found
