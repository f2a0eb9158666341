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
        endpoints: which chains' ends are differentiated, int64 indices `[n]` of the minibatch without repetition; None
            takes all, or draws the loss's `endpoint_share` of them.
    """

    tau: Tensor | None = None
    start: Tensor | None = None
    chain: Tensor | None = None
    probe: Tensor | None = None
    endpoints: Tensor | None = None

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
        if (chosen := self.endpoints) is not None:
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64 or chosen.ndim != 1 or not len(chosen):
                raise TypeError(f"{function}: draws.endpoints must be int64 indices of shape [n], got {chosen!r}")
            if looks_at_values(chosen) and not (
                chosen.min() >= 0 and chosen.max() < len(x) and len(chosen.unique()) == len(chosen)
            ):
                raise ValueError(f"{function}: draws.endpoints must be different indices below {len(x)}, got {chosen}")
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
        endpoints: int | None,
        probing: bool,
        repeatable: bool,
    ) -> tuple[Draws, Tensor | None]:
        """Draw what is left open: from `seed` where given, else from torch's generator.

        Args:
            x, horizon, sigma, layout: of the loss.
            seed: or None.
            steps: number of Langevin updates.
            endpoints: how many ends of chains are differentiated; None for all.
            probing: whether a probe is needed.
            repeatable: whether the chain will be run twice, so that its noise must come from a seed or be held.

        Returns:
            The draws, and the seed from which the kernels make start and chain; None if both are in the draws, or if
            the kernels may take torch's own numbers.
        """
        absent = [name for name in ("start", "chain") if getattr(self, name) is None]
        # The kernels take both or make both, so one alone is made here.
        alone = absent[0] if len(absent) == 1 else None
        key = philox.as_seed(seed, x.device) if seed is not None or alone or (absent and repeatable) else None
        wanted = [name for name in ("tau", "probe") if getattr(self, name) is None and (probing or name != "probe")]
        parts: dict[str, Tensor] = {}
        if key is not None:
            seeded = _Seeded(key, x, horizon, sigma, layout, steps)
            from_key = [alone] if alone else []
            from_key += wanted if seed is not None else []
            parts = {name: getattr(seeded, name)() for name in from_key}
        if endpoints is not None and self.endpoints is None:
            order = torch.rand(len(x), device=x.device) if seed is None else seeded.order()
            parts["endpoints"] = order.argsort()[:endpoints]
        if seed is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            if "tau" in wanted:
                parts["tau"] = horizon.quantile(torch.rand((), dtype=dtype, device=x.device), sigma)
            if "probe" in wanted:
                parts["probe"] = torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)
        return replace(self, **parts), key if len(absent) == 2 else None

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
        seeded = _Seeded(key, x, horizon, sigma, layout, steps)
        return Draws(seeded.tau(), seeded.start(), seeded.chain(), seeded.probe())


@dataclass(frozen=True)
class _Seeded:
    """The numbers of a seed, each made when it is asked for; start and chain as the kernels make them."""

    key: Tensor
    x: Tensor
    horizon: Horizon
    sigma: Tensor | None
    layout: Layout
    steps: int

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    def _normal(self, steps: int, stream: int) -> Tensor:
        points = self.layout.to_points(self.x)
        numbers = philox.normal(self.key, (steps, *points.shape), stream, self._dtype)
        return torch.stack([self.layout.from_points(n).to(self.x.dtype) for n in numbers])

    def tau(self) -> Tensor:
        """The horizon, `[]`."""
        uniform = philox.uniform(self.key, (1,), philox.HORIZON, self._dtype)[0]
        return self.horizon.quantile(uniform, self.sigma)

    def start(self) -> Tensor:
        """n0, shape of x."""
        return self._normal(1, philox.START)[0]

    def chain(self) -> Tensor:
        """ξ, `[steps, *x.shape]`."""
        return self._normal(self.steps, philox.CHAIN)

    def order(self) -> Tensor:
        """Uniform numbers, one a sample: the ends with the least are differentiated."""
        return philox.uniform(self.key, (1, len(self.x)), philox.ENDPOINTS, self._dtype)[0]

    def probe(self) -> Tensor:
        """ε, shape of x, in the order of x's own elements."""
        return philox.rademacher(self.key, (1, *self.x.shape), philox.PROBE, self.x.dtype)[0]
