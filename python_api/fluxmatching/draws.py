"""Every random number of one loss evaluation, so that it can be fixed, replayed and compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxkernels import philox
from fluxmatching.horizon import Horizon
from fluxmatching.layout import Layout


@dataclass(frozen=True)
class Draws:
    """Random numbers of `flux_matching_loss`. Whatever is None is drawn.

    Attributes:
        tau: dimensionless horizon τ, shape `[]`, or `[G]` (one a group) in a grouped loss.
        start: n0 of x0 = x + σ n0, standard normal, shape of x.
        chain: ξ of the Langevin chain, standard normal, `[steps, *x.shape]`.
        probe: ε of Hutchinson's trace estimator, signs ±1, shape of x.
    """

    tau: Tensor | None = None
    start: Tensor | None = None
    chain: Tensor | None = None
    probe: Tensor | None = None

    @staticmethod
    def from_seed(
        seed: int | Tensor,
        x: Tensor,
        horizon: Horizon,
        sigma: Tensor | None = None,
        *,
        grouped: bool = False,
        steps: int = 4,
    ) -> Draws:
        """The numbers that `flux_matching_loss(..., seed=seed)` uses, on every backend and device.

        Args:
            seed: an integer below 2⁶⁴ or an int64 tensor of shape `[]`.
            x: the minibatch, `[N, *event]`.
            horizon: gives τ from a uniform number.
            sigma: σ, for a horizon that depends on it.
            grouped: whether the second dimension of x counts groups.
            steps: number of Langevin updates.
        """
        key = philox.as_seed(seed, x.device)
        layout = Layout(x, grouped)
        points = layout.to_points(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        uniform = philox.uniform(key, (1,), philox.HORIZON, dtype)[0]
        return Draws(
            tau=horizon.quantile(uniform, sigma),
            start=layout.from_points(philox.normal(key, (1, *points.shape), philox.START, dtype)[0]).to(x.dtype),
            chain=torch.stack(
                [
                    layout.from_points(n).to(x.dtype)
                    for n in philox.normal(key, (steps, *points.shape), philox.CHAIN, dtype)
                ]
            ),
            probe=philox.rademacher(key, (1, *x.shape), philox.PROBE, x.dtype)[0],
        )
