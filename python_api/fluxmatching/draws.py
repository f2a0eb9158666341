"""Every random number of one loss evaluation, so that it can be fixed, replayed and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import check_finite, check_same_shape, check_seed, check_tensor, looks_at_values
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

    def check(self, x: Tensor, horizon: Horizon, layout: Layout) -> None:
        """Raise ValueError or TypeError, naming the part, if one does not fit the minibatch x or the horizon."""
        function = layout.function
        for name in ("start", "probe"):
            if (value := getattr(self, name)) is not None:
                check_same_shape(function, f"draws.{name}", value, "x", x)
                check_finite(function, **{f"draws.{name}": value})
        if self.chain is not None:
            check_tensor(function, "draws.chain", self.chain, like=x)
            check_finite(function, **{"draws.chain": self.chain})
            if self.chain.shape[1:] != x.shape:
                raise ValueError(
                    f"{function}: draws.chain must have shape [steps, *x.shape] = "
                    f"{['steps', *x.shape]}, got {list(self.chain.shape)}"
                )
        if self.tau is not None:
            check_tensor(function, "draws.tau", self.tau)
            layout.check_number("draws.tau", self.tau)
            if looks_at_values(self.tau) and not ((self.tau >= 0) & (self.tau <= horizon.tau_max)).all():
                raise ValueError(f"{function}: draws.tau must lie in [0, tau_max = {horizon.tau_max}], got {self.tau}")

    def complete(
        self,
        x: Tensor,
        seed: int | Tensor | None,
        horizon: Horizon,
        sigma: Tensor,
        layout: Layout,
        *,
        steps: int,
        probing: bool,
        repeatable: bool,
    ) -> tuple[Draws, Tensor | None]:
        """Draw what is left open: from `seed` where given, else from torch's generator.

        Args:
            x, horizon, sigma, layout: of the loss.
            seed: or None.
            steps: number of Langevin updates.
            probing: whether a probe is needed.
            repeatable: whether the chain will be run twice, so that its noise must come from a seed or be held.

        Returns:
            The draws, and the seed from which the kernels make start and chain; None if both are in the draws, or if
            the kernels may take torch's own numbers.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        absent = [name for name in ("start", "chain") if getattr(self, name) is None]
        key = (
            philox.as_seed(seed, x.device) if seed is not None or len(absent) == 1 or (absent and repeatable) else None
        )
        drawn = self
        if seed is not None or len(absent) == 1:
            assert key is not None
            whole = Draws.from_seed(key, x, horizon, sigma, grouped=layout.grouped, steps=steps)
            # One of start and chain given: the other one is made here, for the kernels take both or make both.
            fill = absent if len(absent) == 1 else []
            if seed is not None:
                fill = [*fill, *(name for name in ("tau", "probe") if getattr(self, name) is None)]
            drawn = replace(self, **{name: getattr(whole, name) for name in fill})
        if drawn.tau is None:
            drawn = replace(drawn, tau=horizon.quantile(torch.rand((), dtype=dtype, device=x.device), sigma))
        if drawn.probe is None and probing:
            drawn = replace(drawn, probe=torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1))
        return drawn, key if len(absent) == 2 else None

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
        check_tensor("Draws.from_seed", "x", x)
        key = philox.as_seed(check_seed("Draws.from_seed", seed), x.device)
        layout = Layout("Draws.from_seed", x, grouped)
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
