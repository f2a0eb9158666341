"""A 2-D mixture with known noised densities, and fields that are known to preserve them or not."""

from __future__ import annotations

from torch import Tensor

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.rotation import quarter_turn
from fluxmatching.fields import NoisyField

MEANS, VARIANCE = triangle_means(1.8).float(), 0.05
SIGMA_MIN, SIGMA_MAX = 0.05, 10.0
SIGMA_RANGE = (SIGMA_MIN, SIGMA_MAX)


def noised(sigma: float) -> GaussianMixture:
    """Return the density p_σ."""
    return GaussianMixture(MEANS, VARIANCE + sigma**2)


def exact_score(z: Tensor, sigma: Tensor) -> Tensor:
    """Compute ∇ log p_σ."""
    return noised(float(sigma)).score(z.cpu()).to(z)


def circulating(strength: float) -> NoisyField:
    """Return s + αJs with a quarter turn J: ∇·(p Js) = ∇·(J∇p) = 0, so it preserves p_σ like s; not reversible."""

    def field(z: Tensor, sigma: Tensor) -> Tensor:
        score = exact_score(z, sigma)
        return score + strength * quarter_turn(score)

    return field


def longer(factor: float) -> NoisyField:
    """Return a multiple of the score: the same direction, longer steps; it does not preserve p_σ."""
    return lambda z, sigma: factor * exact_score(z, sigma)


EXACT, CIRCULATING, LONGER = "exact score s", "s + Js", "1.25 s"
KNOWN: dict[str, NoisyField] = {
    EXACT: exact_score,
    "s + Js/4": circulating(0.25),
    CIRCULATING: circulating(1.0),
    "s + 2Js": circulating(2.0),
    LONGER: longer(1.25),
}
