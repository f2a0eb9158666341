"""Losses called with the fields of `FluxOptions` and `DSMOptions` as keywords, for tests that vary one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxmatching import DSMOptions, FluxOptions, FluxTarget, LossNormalizer, dsm_loss, flux_matching_loss, flux_target
from fluxmatching.fields import Field, NoisyField
from fluxmatching.losses.annealed import AnnealedTerms, annealed_terms

GIVEN = ("refs", "draws", "seed")  # keywords of the losses themselves


def _split(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (fields of the options, keywords of the loss)."""
    given = {name: keywords.pop(name) for name in GIVEN if name in keywords}
    return keywords, given


def flux_loss(field: Field, x: Tensor, sigma: float | Tensor, **keywords: Any) -> Tensor:
    options, given = _split(keywords)
    return flux_matching_loss(field, x, sigma, FluxOptions(**options), **given)


def target_of(field: Field, x: Tensor, sigma: float | Tensor, **keywords: Any) -> FluxTarget:
    options, given = _split(keywords)
    return flux_target(field, x, sigma, FluxOptions(**options), **given)


def annealed_loss(
    field: NoisyField, x: Tensor, sigma: float | Tensor, normalizer: LossNormalizer, **keywords: Any
) -> AnnealedTerms:
    options, given = _split(keywords)
    return annealed_terms(field, x, sigma, normalizer, FluxOptions(**options), **given)


def score_matching_loss(field: Field, x: Tensor, sigma: float | Tensor, **keywords: Any) -> Tensor:
    options, given = _split(keywords)
    return dsm_loss(field, x, sigma, DSMOptions(**options), **given)
