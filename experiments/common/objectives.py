"""Flux Matching, its fast-mixing form and score matching: losses of one field over all noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.common import figures as style
from fluxkernels.checks import check_sigma_range
from fluxmatching import (
    DenoisingScoreMatching,
    DSMOptions,
    FluxOptions,
    Horizon,
    LearnedHorizon,
    LossNormalizer,
    NoiseAnnealedFluxMatching,
    Trainer,
    TruncatedExponentialHorizon,
    UniformHorizon,
    mixing_loss,
)
from fluxmatching.fields import NoisyField
from fluxmatching.losses.modules import NoiseLevels

FAST, FLUX, DSM = OBJECTIVES = ("fast flux", "flux", "DSM")
COLORS = {FAST: style.PRESERVING, FLUX: style.FLUX, DSM: style.SCORE_MATCHING}
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


class PlainAttention(NoiseAnnealedFluxMatching):
    """Noise-annealed Flux Matching without fused attention, which has no double backward."""

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x, seed=seed)


@dataclass(frozen=True)
class MixingTerm:
    """The mixing proxy in the loss.

    Args:
        weight: λ of Eq. 45.
        drift_times_sigma: whether the proxy steps along σ f, as the published program does, instead of f (Eq. 43).
    """

    weight: float = 0.01
    drift_times_sigma: bool = False


class FastFluxMatching(NoiseAnnealedFluxMatching):
    """Noise-annealed Flux Matching with the mixing proxy added, ℓ + λ ℓ_mixing (Eq. 45).

    Args:
        field, noise, options: as in `NoiseAnnealedFluxMatching`.
        term: weight and drift of the proxy.
    """

    def __init__(self, field: NoisyField, noise: NoiseLevels, options: FluxOptions, term: MixingTerm) -> None:
        super().__init__(field, noise, options)
        self.mixing, self.term = LossNormalizer(), term

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss `[]` and what `NoiseAnnealedFluxMatching` logs, with "mixing" added."""
        loss, logged = super().forward(x, seed=seed)
        drift = times_sigma(self.field) if self.term.drift_times_sigma else self.field
        # One number per minibatch, repeated for its samples.
        mixing = mixing_loss(drift, x, logged["sigma"], self.mixing, seed=self.key(x, seed))[0]
        loss = loss + self.term.weight * mixing
        return loss, {**logged, "loss": loss.detach(), "mixing": mixing.detach()}


def times_sigma(field: NoisyField) -> NoisyField:
    """Return the field σ f(z, σ)."""
    return lambda z, sigma: sigma * field(z, sigma)


def make_loss(
    objective: str,
    field: nn.Module,
    noise: NoiseLevels,
    horizon: Horizon,
    *,
    backend: str | None,
    chunk_size: int | None = None,
    mixing: MixingTerm = MixingTerm(),
    refs: Tensor | None = None,
) -> nn.Module:
    """Make the loss module of an objective, with one σ per minibatch (Eq. 11, 45).

    Score matching has the same noise levels and normalizer, and stable targets (B.3, B.5). Parts that objectives share
    start with the same weights if torch's generator and the arguments are the same.

    Args:
        objective: one of `OBJECTIVES`.
        field: f(z, σ).
        noise: distribution of σ.
        horizon: distribution of τ; not used in score matching.
        backend: backend of the ops.
        chunk_size: see `fluxmatching.FluxOptions`.
        mixing: weight and drift of the mixing proxy.
        refs: reference points of Flux Matching and score matching; None for the minibatch.

    Raises:
        ValueError: no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective == DSM:
        dsm, normalizer = DSMOptions(backend=backend), LossNormalizer()
        return DenoisingScoreMatching(field, noise, dsm, normalizer=normalizer, sigma_per_sample=False, refs=refs)
    options = FluxOptions(horizon=horizon, strata=1, chunk_size=chunk_size, backend=backend)
    if objective == FAST:
        return FastFluxMatching(field, noise, options, mixing)
    return NoiseAnnealedFluxMatching(field, noise, options, refs=refs)


def averaged_field(trainer: Trainer) -> nn.Module:
    """Return the moving average of the field, with dropout off."""
    return trainer.average.module.get_submodule("field").eval()
