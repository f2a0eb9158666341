"""Flux Matching, its fast-mixing form and score matching: losses of one model over all noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from experiments.common import figures as style
from fluxkernels.checks import check_sigma_range
from fluxmatching import (
    DSMOptions,
    EDMField,
    FluxOptions,
    Horizon,
    LearnedHorizon,
    LossNormalizer,
    TruncatedExponentialHorizon,
    UniformHorizon,
    dsm_loss,
    mixing_loss,
)
from fluxmatching.losses.annealed import annealed_terms
from fluxmatching.training import Loss

FAST, FLUX, DSM = OBJECTIVES = ("fast flux", "flux", "DSM")
COLORS = {FAST: style.PRESERVING, FLUX: style.FLUX, DSM: style.SCORE_MATCHING}


class Noise(Protocol):
    """Distribution of σ, drawn from torch's generator."""

    def sample(self) -> Tensor: ...


# The three of the paper (D.1.1), by the names that configs use.
HORIZONS: dict[str, Callable[[float], Horizon]] = {
    "learned": lambda tau_max: LearnedHorizon(tau_max=tau_max),
    "uniform": UniformHorizon,
    "exponential": lambda tau_max: TruncatedExponentialHorizon(1.0, tau_max),
}


def check_training(name: str, config: Any) -> None:
    """Raise ValueError if a config's noise levels, horizon or number of evaluations are out of range."""
    check_sigma_range(name, config.sigma_min, config.sigma_max)
    if config.horizon not in HORIZONS:
        raise ValueError(f"horizon must be one of {', '.join(HORIZONS)}, got {config.horizon!r}")
    if config.evaluations > config.iterations:
        raise ValueError(f"evaluations must be at most iterations, got {config.evaluations} and {config.iterations}")


def stages(config: Any) -> list[int]:
    """Return the iterations after which a model is evaluated, at equal distances over its training."""
    return [config.iterations * stage // config.evaluations for stage in range(1, config.evaluations + 1)]


def make_model(network: nn.Module, sigma_data: float, horizon: Horizon) -> nn.ModuleDict:
    """Make the field and what is learned beside it: the same parameters for every objective, used or not.

    Args:
        network: F(x, c_noise).
        sigma_data: argument of `EDMField`.
        horizon: distribution of τ in Flux Matching.
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
    chunk_size: int | None = None,
) -> Loss:
    """Make the noise-annealed loss of a `make_model` (Eq. 11, 45), with one σ per minibatch.

    Score matching has the same noise levels and normalizer, and stable targets (B.3, B.5).

    Args:
        objective: one of `OBJECTIVES`.
        noise: distribution of σ.
        backend: backend of the ops.
        mixing_weight: λ of Eq. 45.
        chunk_size: see `fluxmatching.FluxOptions`.

    Returns:
        A loss for `Trainer`: one number per sample, and a dictionary with "sigma" and, for Flux Matching, "tau".
    """

    def of_minibatch(model: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, nn.ModuleDict)
        sigma = noise.sample().to(x.device)
        field, normalizer = model["field"], cast(LossNormalizer, model["normalizer"])
        if objective == DSM:
            values = dsm_loss(lambda z: field(z, sigma), x, sigma, DSMOptions(backend=backend), seed=seed)
            return normalizer(values, sigma), {"sigma": sigma}
        options = FluxOptions(horizon=cast(Horizon, model["horizon"]), chunk_size=chunk_size, backend=backend)
        terms = annealed_terms(field, x, sigma, normalizer, options, seed=seed)
        total = terms.total
        if objective == FAST:
            mixing = mixing_loss(field, x, sigma, cast(LossNormalizer, model["mixing"]), seed=seed)
            total = total + mixing_weight * mixing[0]  # one number per minibatch, repeated for its samples
        return total, {"sigma": sigma, "tau": terms.tau}

    return of_minibatch
