"""Noise-annealed Flux Matching: one loss over all noise levels (Eq. 11)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fluxkernels.checks import as_number_tensor, check_tensor
from fluxmatching.engines import without_engine
from fluxmatching.fields import Field, NoisyField
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.noise_levels import LinearInLogSigma
from fluxmatching.losses.options import FluxOptions, as_sigma, check_options
from fluxmatching.losses.second_derivatives import ConditionedField
from fluxmatching.losses.target import FluxTarget, build_target


class LossNormalizer(nn.Module):
    """Learned scale s_η(σ), which brings the losses of all noise levels to one scale (Eq. 11).

    Args:
        hidden: width of the hidden linear map.
    """

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.layer = LinearInLogSigma(hidden)

    def log_scale(self, sigma: Tensor) -> Tensor:
        """Return s_η(σ), shape of sigma."""
        return self.layer(sigma)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """Return loss / exp(s_η(σ)) + s_η(σ), smallest on average where exp(s_η(σ)) is the mean loss at σ.

        Args:
            loss: `[N]`.
            sigma: σ, `[]` or `[N]`.
        """
        if sigma.ndim and sigma.shape != loss.shape:
            raise ValueError(
                f"sigma must be one number or have the shape of loss, {list(loss.shape)}, got {list(sigma.shape)}"
            )
        log_scale = self.log_scale(sigma)
        return loss * (-log_scale).exp() + log_scale


class FixedScale:
    """Known scale of the losses, in place of a learned one.

    Args:
        scale: positive, `[]` or `[N]`.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def log_scale(self, sigma: Tensor) -> Tensor:
        """Return the logarithm of the scale."""
        return self.scale.log()

    def __call__(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """Return loss / scale, `[N]`."""
        return loss / self.scale


@dataclass(frozen=True)
class AnnealedTerms:
    """Parts of the noise-annealed loss.

    Attributes:
        total: Eq. 11, plus Eq. 51 if the horizon is learned, `[N]`.
        flux: the Flux Matching loss alone, detached, `[N]`.
        tau: the horizon that was drawn, `[]` or `[strata]`.
        sigma: σ, `[]` or `[strata]`.
    """

    total: Tensor
    flux: Tensor
    tau: Tensor
    sigma: Tensor


def noise_annealed_flux_loss(
    field: NoisyField,
    x: Tensor,
    sigma: float | Tensor,
    normalizer: LossNormalizer,
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute noise-annealed Flux Matching at one noise level: ℓ^σ / exp(s_η(σ)) + s_η(σ) (Eq. 11), `[N]`.

    If the horizon is learned, -sg(ℓ^σ / exp(s_η(σ))) log q(τ) is added (Eq. 51). Its gradient reaches the parameters
    of the horizon only, so one optimizer can hold the network, the normalizer and the horizon.

    Args:
        field: f(z, σ), z `[n, *event]`, σ of shape `[]`; with one σ per stratum, `[n]`.
        x: clean minibatch, `[N, *event]`.
        sigma: σ > 0, shared by the minibatch; or one per stratum of the options, `[strata]`.
        normalizer: s_η.
        options: see `FluxOptions`; not "closed_form", whose method takes no σ.
        refs, draws, seed: as in `flux_matching_loss`, and so are the errors.
    """
    return annealed_terms(field, x, sigma, normalizer, options, refs=refs, draws=draws, seed=seed).total


def annealed_terms(
    field: NoisyField,
    x: Tensor,
    sigma: float | Tensor,
    normalizer: LossNormalizer,
    options: FluxOptions = FluxOptions(),
    *,
    refs: Tensor | None = None,
    draws: Draws | None = None,
    seed: int | Tensor | None = None,
) -> AnnealedTerms:
    """Compute `noise_annealed_flux_loss` together with the parts that are worth logging."""
    function = "noise_annealed_flux_loss"
    check_options(function, options, FluxOptions)
    for name, value in (("field", field), ("normalizer", normalizer)):
        if not callable(value):
            raise TypeError(f"{function}: {name} must be callable, got {type(value).__name__}")
    check_tensor(function, "x", x)
    as_sigma(function, sigma, like=x)
    level = as_number_tensor(function, "sigma", sigma, like=x)
    options = options.with_strata(len(level) if level.ndim == 1 else 1)
    if level.ndim and (options.strata == 1 or list(level.shape) != [options.strata]):
        takes = "one number" if options.strata == 1 else f"one number or one per stratum, shape [{options.strata}]"
        raise ValueError(f"{function}: sigma must be {takes}, got shape {list(level.shape)}")
    if options.second_derivatives == "closed_form":
        raise ValueError(
            f"{function}: second_derivatives='closed_form' is for fields f(z) without a noise level; give one that "
            f"holds its own σ to flux_matching_loss"
        )
    bound = ConditionedField(without_engine(function, field), level)
    target = build_target(function, bound, x, level, options, refs=refs, draws=draws, seed=seed)
    return normalized_terms(target, lambda z: field(z, target.sigma), normalizer, options, level)


def normalized_terms(
    target: FluxTarget, field: Field, normalizer: LossNormalizer | FixedScale, options: FluxOptions, level: Tensor
) -> AnnealedTerms:
    """Bring the loss of a target to the scale of all noise levels (Eq. 11), with that of a learned horizon (Eq. 51).

    Args:
        field: f(z) at the noise levels of the target; differentiable in its parameters.
        level: σ, `[]` or `[strata]`.
    """
    flux = target.loss(field)
    total = normalizer(flux, target.sigma)
    if options.horizon is not None and options.horizon.learned:
        relative = flux.detach() * (-normalizer.log_scale(target.sigma).detach()).exp()
        total = total + options.horizon.fit_loss(target.per_sample(target.tau), relative, target.sigma)
    return AnnealedTerms(total, flux.detach(), target.tau, level)
