"""Flux Matching, its fast-mixing form and score matching as losses of one model over all noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from experiments.common import figures as style
from fluxkernels.checks import check_sigma_range
from fluxmatching import (
    EDMField,
    Horizon,
    LearnedHorizon,
    LossNormalizer,
    TruncatedExponentialHorizon,
    UniformHorizon,
    dsm_loss,
    mixing_loss,
    noise_annealed_flux_loss,
)
from fluxmatching.training import Loss

FAST, FLUX, DSM = OBJECTIVES = ("fast flux", "flux", "DSM")
COLOURS = {FAST: style.PRESERVING, FLUX: style.FLUX, DSM: style.SCORE_MATCHING}


class Noise(Protocol):
    """A distribution of σ, drawn from torch's generator."""

    def sample(self) -> Tensor: ...


# The paper's three (D.1.1), by the names that configs use.
HORIZONS: dict[str, Callable[[float], Horizon]] = {
    "learned": lambda tau_max: LearnedHorizon(tau_max=tau_max),
    "uniform": UniformHorizon,
    "exponential": lambda tau_max: TruncatedExponentialHorizon(1.0, tau_max),
}


def check_training(name: str, config: Any) -> None:
    """Raise ValueError if a config's noise levels, horizon or number of evaluations cannot be."""
    check_sigma_range(name, config.sigma_min, config.sigma_max)
    if config.horizon not in HORIZONS:
        raise ValueError(f"horizon must be one of {', '.join(HORIZONS)}, got {config.horizon!r}")
    if config.evaluations > config.iterations:
        raise ValueError(f"evaluations must be at most iterations, got {config.evaluations} and {config.iterations}")


def stages(config: Any) -> list[int]:
    """Iterations after which a model is judged, evenly over its training."""
    return [config.iterations * stage // config.evaluations for stage in range(1, config.evaluations + 1)]


def make_model(network: nn.Module, sigma_data: float, horizon: Horizon) -> nn.ModuleDict:
    """The field and what is learned beside it: the same parameters for every objective, used or not.

    Args:
        network: F(x, c_noise).
        sigma_data: of `EDMField`.
        horizon: of Flux Matching.
    """
    return nn.ModuleDict(
        {
            "field": EDMField(network, sigma_data),
            "normalizer": LossNormalizer(),
            "horizon": horizon,
            "mixing": LossNormalizer(),
        }
    )


def make_loss(
    objective: str,
    noise: Noise,
    *,
    backend: str | None,
    mixing_weight: float = 0.01,
    chunk: int | None = None,
) -> Loss:
    """The noise-annealed loss of a minibatch of a `make_model` (Eq. 11, 45), one σ for all of it.

    Score matching has the same noise levels and normalizer, and stable targets (B.3, B.5).

    Args:
        objective: of `OBJECTIVES`.
        noise: of σ.
        backend: of the ops.
        mixing_weight: λ of Eq. 45.
        chunk: see `fluxmatching.flux_matching_loss`.
    """

    def of_minibatch(model: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, nn.ModuleDict)
        sigma = noise.sample().to(x.device)
        field, normalizer = model["field"], model["normalizer"]
        if objective == DSM:
            values = dsm_loss(lambda z: field(z, sigma), x, sigma.square(), seed=seed, backend=backend)
            return normalizer(values, sigma), {"sigma": sigma}
        found = noise_annealed_flux_loss(
            field, x, sigma, normalizer, horizon=model["horizon"], seed=seed, chunk=chunk, backend=backend
        )
        total = found.total
        if objective == FAST:
            total = total + mixing_weight * mixing_loss(field, x, sigma, model["mixing"], seed=seed)
        return total, {"sigma": sigma, "tau": found.tau}

    return of_minibatch
