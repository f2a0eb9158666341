"""Flux Matching loss at one noise level (Eq. 6, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from fluxmatching.fields import Field
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.options import FluxOptions
from fluxmatching.losses.target import build_target


def flux_matching_loss(
    field: Field,
    x: Tensor,
    sigma: float | Tensor,
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute the Flux Matching loss of a vector field (Eq. 6, Algorithm 1), one number per sample.

    ℓ_i = -2 u(x0_i)·q̂_i with u = f - s, s the score of the kernel density estimate on `refs`, x0 = x + σ n0 and
    q̂_i = e^{-τ}/q(τ) Σ_j w_ij ∇r(x_τ^j) detached, r = ∇·u + u·s. Its gradient is that of J̃/σ², where J̃ is the projected
    Fisher divergence (Theorem 3.1), and its mean is 2 J̃/σ². The mean loss is 0 for fields that preserve p_σ. A single
    ℓ_i can be negative.

    Args:
        field: maps `[n, *event]` to the same shape, each sample by itself.
        x: clean minibatch, `[N, *event]`, float32 or float64; grouped: `[N, G, D]`.
        sigma: σ > 0 in units of x, one value per minibatch (grouped: or one per group, `[G]`).
        options: estimator, horizon, derivatives, backend; see `FluxOptions`.
        refs: reference points of the kernel density estimate, `[M, *event]`, or grouped `[M, G, D]` or `[M, 1, D]`.
            Default x.
        draws: fixes some or all of the random numbers.
        seed: determines those not in `draws`, equally on every device and backend. None uses torch's generator.

    Returns:
        ℓ, `[N]`, summed over the event. Differentiable in the field's parameters; take its mean as the loss.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the requested backend cannot run here.
    """
    target = build_target("flux_matching_loss", field, x, sigma, options, refs=refs, draws=draws, seed=seed)
    return target.loss(field)
