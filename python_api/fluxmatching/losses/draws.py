"""Random numbers of one loss evaluation, which can be fixed, replayed and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import can_check_values, check_dense, check_finite, check_same_shape, check_seed, check_tensor
from fluxmatching.losses.grouping import Grouping
from fluxmatching.losses.horizons import Horizon


@dataclass(frozen=True)
class Draws:
    """Random numbers of a loss. Those that are None are drawn.

    Attributes:
        tau: dimensionless horizon τ, shape `[]`, or `[G]` (one per group) in a grouped loss, or `[strata]`.
        start: n0 of x0 = x + σ n0, standard normal, shape of x.
        chain: ξ of the Langevin chain, standard normal, `[num_steps, *x.shape]`.
        probe: ε of Hutchinson's trace estimator, signs ±1, shape of x.
        endpoints: chains whose endpoints are differentiated, distinct int64 indices `[n]` into the minibatch. None
            takes all, or draws the `endpoint_fraction` of the options.
    """

    tau: Tensor | None = None
    start: Tensor | None = None
    chain: Tensor | None = None
    probe: Tensor | None = None
    endpoints: Tensor | None = None

    def check(self, x: Tensor, horizon: Horizon, grouping: Grouping, strata: int = 1) -> None:
        """Raise ValueError or TypeError, naming the part, if one does not fit the minibatch x or the horizon."""
        function = grouping.function
        for name in ("start", "probe"):
            if (value := getattr(self, name)) is not None:
                check_same_shape(function, f"draws.{name}", value, "x", x)
                check_finite(function, **{f"draws.{name}": value})
        if self.chain is not None:
            check_tensor(function, "draws.chain", self.chain, like=x)
            check_finite(function, **{"draws.chain": self.chain})
            if self.chain.shape[1:] != x.shape:
                raise ValueError(
                    f"{function}: draws.chain must have shape [num_steps, *x.shape] = "
                    f"{['num_steps', *x.shape]}, got {list(self.chain.shape)}"
                )
        if self.endpoints is not None:
            self._check_endpoints(function, self.endpoints, x.shape[0])
        if self.tau is not None:
            check_tensor(function, "draws.tau", self.tau)
            if list(self.tau.shape) != [strata] or strata == 1:
                grouping.check_number("draws.tau", self.tau)
            if can_check_values(self.tau) and not ((self.tau >= 0) & (self.tau <= horizon.tau_max)).all():
                raise ValueError(f"{function}: draws.tau must lie in [0, tau_max = {horizon.tau_max}], got {self.tau}")

    @staticmethod
    def _check_endpoints(function: str, chosen: Tensor, samples: int) -> None:
        if isinstance(chosen, Tensor):
            check_dense(function, "draws.endpoints", chosen)
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64 or chosen.ndim != 1 or not len(chosen):
            raise TypeError(f"{function}: draws.endpoints must be int64 indices of shape [n], got {chosen!r}")
        if can_check_values(chosen) and not (
            chosen.min() >= 0 and chosen.max() < samples and len(chosen.unique()) == len(chosen)
        ):
            raise ValueError(f"{function}: draws.endpoints must be different indices below {samples}, got {chosen}")

    def complete(self, request: DrawRequest, seed: int | Tensor | None) -> tuple[Draws, Tensor | None]:
        """Draw what is None: from `seed` where given, else from torch's generator.

        Returns:
            The draws, and the seed from which the kernels make start and chain; None if both are in the draws, or if
            the kernels may use torch's own numbers.
        """
        x = request.x
        absent = [name for name in ("start", "chain") if getattr(self, name) is None]
        # The kernels take both or make both, so one alone is made here.
        alone = absent[0] if len(absent) == 1 else None
        needs_key = seed is not None or alone or (absent and request.runs_chain_twice)
        key = philox.as_seed(seed, x.device) if needs_key else None
        missing = [name for name in ("tau", "probe") if getattr(self, name) is None]
        if not request.needs_probe and "probe" in missing:
            missing.remove("probe")
        parts: dict[str, Tensor] = {}
        if key is not None:
            seeded = _SeededDraws(key, request)
            from_key = [alone] if alone else []
            from_key += missing if seed is not None else []
            parts = {name: getattr(seeded, name)() for name in from_key}
        if request.num_endpoints is not None and self.endpoints is None:
            order = torch.rand(x.shape[:1], device=x.device) if seed is None else seeded.order()
            parts["endpoints"] = order.argsort()[: request.num_endpoints]
        if seed is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            if "tau" in missing:
                uniform = torch.rand(request.numbers_for_tau, dtype=dtype, device=x.device)
                parts["tau"] = request.tau(uniform)
            if "probe" in missing:
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
        num_steps: int = 4,
    ) -> Draws:
        """Return the numbers that `flux_matching_loss(..., seed=seed)` uses, on every backend and device.

        Args:
            seed: an integer below 2⁶⁴ or an int64 tensor of shape `[]`.
            x: the minibatch, `[N, *event]`.
            horizon: converts a uniform number to τ.
            sigma: σ, for a horizon that depends on it.
            grouped: whether the second dimension of x counts groups.
            num_steps: number of Langevin updates.
        """
        check_tensor("Draws.from_seed", "x", x)
        key = philox.as_seed(check_seed("Draws.from_seed", seed), x.device)
        grouping = Grouping("Draws.from_seed", x, grouped)
        seeded = _SeededDraws(key, DrawRequest(x, horizon, sigma, grouping, num_steps))
        return Draws(seeded.tau(), seeded.start(), seeded.chain(), seeded.probe())


def seeded_start(x: Tensor, key: Tensor) -> Tensor:
    """Return the normal noise n0 of a seed, shape of x, in at least float32: `start` of `Draws.from_seed`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return philox.normal(key, (1, x.shape[0], x.shape[1:].numel()), philox.START, dtype)[0].view(x.shape)


@dataclass(frozen=True)
class DrawRequest:
    """Everything that decides which random numbers a loss needs, apart from the seed.

    Attributes:
        x: the minibatch.
        horizon, sigma: distribution of τ, and the σ that it may depend on.
        grouping: layout of x.
        num_steps: number of Langevin updates.
        num_endpoints: how many endpoints are differentiated; None for all.
        needs_probe: whether the divergence is estimated with a probe.
        runs_chain_twice: whether the chain's noise must be reproducible, from a seed or stored.
        strata: number of τ.
    """

    x: Tensor
    horizon: Horizon
    sigma: Tensor | None
    grouping: Grouping
    num_steps: int
    num_endpoints: int | None = None
    needs_probe: bool = True
    runs_chain_twice: bool = False
    strata: int = 1

    def tau(self, uniform: Tensor) -> Tensor:
        """Convert uniform numbers `[numbers_for_tau]` to τ, one from each of `strata` equally probable intervals.

        The first stratum takes a random interval, and the others follow it: a stratum's τ is independent of its σ.
        """
        if self.strata == 1:
            return self.horizon.quantile(uniform[0], self.sigma)
        interval = torch.arange(self.strata, device=uniform.device)
        interval = (interval + (uniform[-1] * self.strata).long()) % self.strata
        return self.horizon.quantile((interval + uniform[:-1]) / self.strata, self.sigma)

    @property
    def numbers_for_tau(self) -> int:
        return 1 if self.strata == 1 else self.strata + 1


@dataclass(frozen=True)
class _SeededDraws:
    """Numbers of a seed, each computed on request; start and chain equal those that the kernels make."""

    key: Tensor
    request: DrawRequest

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.request.x.dtype, torch.float32)

    def _normal(self, num_steps: int, stream: int) -> Tensor:
        x, grouping = self.request.x, self.request.grouping
        numbers = philox.normal(self.key, (num_steps, *grouping.to_points(x).shape), stream, self._dtype)
        return torch.stack([grouping.from_points(n).to(x.dtype) for n in numbers])

    def tau(self) -> Tensor:
        """τ, `[]` or `[strata]`."""
        shape = (1, self.request.numbers_for_tau)
        return self.request.tau(philox.uniform(self.key, shape, philox.HORIZON, self._dtype)[0])

    def start(self) -> Tensor:
        """n0, shape of x."""
        return self._normal(1, philox.START)[0]

    def chain(self) -> Tensor:
        """ξ, `[num_steps, *x.shape]`."""
        return self._normal(self.request.num_steps, philox.CHAIN)

    def order(self) -> Tensor:
        """Uniform numbers, one per sample; the endpoints with the smallest are differentiated."""
        return philox.uniform(self.key, (1, self.request.x.shape[0]), philox.ENDPOINTS, self._dtype)[0]

    def probe(self) -> Tensor:
        """ε, shape of x, in the order of the elements of x."""
        x = self.request.x
        return philox.rademacher(self.key, (1, *x.shape), philox.PROBE, x.dtype)[0]
