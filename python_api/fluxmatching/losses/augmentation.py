"""Augmentation loss: fields that may be added to a score without changing its stationary distribution (Eq. 48)."""

from __future__ import annotations

from torch import Tensor

from fluxmatching.fields import Field
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.options import FluxOptions
from fluxmatching.losses.target import MatchedField, build_target


def augmentation_loss(
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute the augmentation loss of a field v, one number per sample (Eq. 48).

    It is `flux_matching_loss` with u = v in place of u = f - s. The mean loss is 0 for fields with ∇·(p_σ v) = 0, which
    can be added to the score, or to any field that keeps p_σ. A field that is zero everywhere has loss 0 too.

    Arguments, result and errors are those of `flux_matching_loss`.
    """
    name, matched = "augmentation_loss", MatchedField(0.0, 0.0)
    return build_target(name, field, x, sigma, options, matched, refs=refs, draws=draws, seed=seed).loss(field)
