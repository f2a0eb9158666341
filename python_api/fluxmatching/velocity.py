"""RNA velocity: the splicing model fitted by Flux Matching, in scVelo's conventions (Sec. 4.2, B.2).

>>> import scvelo as scv                                        # doctest: +SKIP
>>> from fluxmatching.velocity import flux_velocity
>>> flux_velocity(adata)                                        # doctest: +SKIP
>>> scv.tl.velocity_graph(adata)                                # doctest: +SKIP
>>> scv.pl.velocity_embedding_stream(adata)                     # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkernels import resolve_backend
from fluxmatching.losses import flux_target
from fluxmatching.training import Trainer, TrainingOptions

if TYPE_CHECKING:
    from anndata import AnnData

UNSPLICED, SPLICED = 0, 1  # of the last dimension


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
    """Cells of two layers as samples `[n, G, 2]`, made when asked for: the layers are not copied."""

    def __init__(self, unspliced: Any, spliced: Any, genes: np.ndarray) -> None:
        self.layers, self.genes = (unspliced, spliced), genes

    def __len__(self) -> int:
        return int(self.layers[0].shape[0])

    def __getitem__(self, cells: Tensor) -> Tensor:
        rows = cells.numpy()
        return torch.stack([torch.from_numpy(_dense(layer[rows])[:, self.genes]) for layer in self.layers], -1)


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
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    progress: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Fit the splicing model of every gene by Flux Matching, and write its velocities where scVelo looks for them.

    One `SplicingField` for all genes is trained on minibatches of cells; the density estimate is a separate one in the
    plane (u, s) of each gene. The defaults are the paper's (Table 2). Rates and velocities are in units of the inverse
    of a time in which cells diffuse by dx = f dt + √2 dW in units of the layers: directions and ratios of rates have a
    meaning, the common scale has none.

    Written, and nothing else:

        layers[vkey], layers[vkey + "_u"]    ds/dt and du/dt of every cell and gene; NaN in genes that were left out
        layers[vkey + "_alpha"]              α of every cell and gene
        var[vkey + "_a" / "_b" / "_c"]       of α = softplus(a u + b s + c)
        var[vkey + "_beta" / "_gamma"]       rates of splicing and degradation
        var[vkey + "_genes"]                 whether a gene was fitted
        uns[vkey + "_params"]                "mode": "flux", and the arguments

    Args:
        adata: annotated data with the layers `ukey` and `xkey`, as `scv.pp.moments` makes them; dense or sparse.
        vkey: name of the result.
        ukey, xkey: layers of unspliced and spliced abundance.
        passes: over all cells.
        batch_size: cells a minibatch; all cells if there are fewer.
        sigma2: σ² of the density estimates, in squared units of the layers.
        lr: learning rate of Adam.
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
    if passes < 1 or batch_size < 2:
        raise ValueError(f"flux_velocity: passes must be at least 1 and batch_size 2, got {passes} and {batch_size}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    used = resolve_backend(backend, device)
    genes = _genes_to_fit(adata.layers[ukey], adata.layers[xkey])
    cells = _Cells(adata.layers[ukey], adata.layers[xkey], np.flatnonzero(genes))
    batch_size = min(batch_size, len(cells))
    iterations = passes * (len(cells) // batch_size)
    options = TrainingOptions(
        iterations, batch_size, lr=lr, optimizer="adam", ema=0.0, clip=None, seed=seed, progress=progress
    )

    def loss(model: nn.Module, x: Tensor, seed: Tensor) -> Tensor:
        assert isinstance(model, SplicingField)
        target = flux_target(
            model, x, sigma2, grouped=True, endpoint="closed_form", divergence="exact", seed=seed, backend=backend
        )
        # Genes share no parameters; σ⁴ makes the loss independent of σ's unit (the paper's scaling).
        return sigma2**2 * target.loss(model).flatten(1).sum(1)

    field = SplicingField(len(cells.genes)).to(device)
    Trainer(field, loss, cells, options).run()

    found = _evaluate(field, cells, adata.n_vars)
    result = adata.copy() if copy else adata
    result.layers[vkey], result.layers[f"{vkey}_u"], result.layers[f"{vkey}_alpha"] = found
    for name in ("a", "b", "c", "beta", "gamma"):
        values = np.full(adata.n_vars, np.nan, dtype=np.float32)
        values[genes] = getattr(field, name).detach().cpu().numpy()
        result.var[f"{vkey}_{name}"] = values
    result.var[f"{vkey}_genes"] = genes
    result.uns[f"{vkey}_params"] = {
        "mode": "flux", "ukey": ukey, "xkey": xkey, "passes": passes, "batch_size": batch_size, "sigma2": sigma2,
        "lr": lr, "seed": seed, "backend": used, "device": str(device),
    }  # fmt: skip
    return result if copy else None


def _genes_to_fit(*layers: Any) -> np.ndarray:
    """Genes that vary in every layer and are finite in all; a warning counts the others."""
    fine = np.ones(layers[0].shape[1], dtype=bool)
    for layer in layers:
        for start in range(0, layer.shape[1], 256):  # a whole layer as float32 could be gigabytes
            block = _dense(layer[:, start : start + 256])
            spread = np.ptp(block, 0)
            fine[start : start + 256] &= np.isfinite(spread) & (spread > 0)
    if not fine.any():
        raise ValueError("flux_velocity: no gene varies in both layers with finite values")
    if not fine.all():
        warnings.warn(
            f"flux_velocity: {np.sum(~fine)} of {len(fine)} genes are constant or not finite in a layer; they are left "
            f"out, and their velocity is NaN",
            stacklevel=3,
        )
    return fine


def _evaluate(field: SplicingField, cells: _Cells, genes: int) -> list[np.ndarray]:
    """ds/dt, du/dt and α, each `[cells, genes]`, NaN in genes that were not fitted."""
    found = [np.full((len(cells), genes), np.nan, dtype=np.float32) for _ in range(3)]
    device = field.a.device
    with torch.no_grad():
        for rows in torch.arange(len(cells)).split(1024):
            x = cells[rows].to(device)
            velocity = field(x)
            for values, part in zip(
                found, (velocity[..., SPLICED], velocity[..., UNSPLICED], field.transcription(x)), strict=True
            ):
                values[np.ix_(rows.numpy(), cells.genes)] = part.cpu().numpy()
    return found
