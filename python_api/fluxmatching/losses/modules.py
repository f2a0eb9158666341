"""Losses as modules: each holds the field and returns a mean loss and a dictionary to log."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fluxmatching.field_modules import networks_of
from fluxmatching.fields import Field, NoisyField
from fluxmatching.losses.annealed import LossNormalizer, annealed_terms
from fluxmatching.losses.draws import Draws
from fluxmatching.losses.dsm import DSMOptions, dsm_loss
from fluxmatching.losses.options import FluxOptions, check_options
from fluxmatching.losses.target import flux_target

Logged = dict[str, Tensor]


class LossModule(nn.Module):
    """Base of the loss modules: one module for an optimizer or engine, with everything that is learned.

    Args:
        field: a module, or a function without parameters.
        horizon: horizon of the options, or None.

    Raises:
        TypeError: the field is a function that uses a network; its parameters would not be registered.
    """

    def __init__(self, field: Callable[..., Tensor], horizon: nn.Module | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if not callable(field):
            raise TypeError(f"{name}: field must be callable, got {type(field).__name__}")
        if not isinstance(field, nn.Module) and (networks := networks_of(field)):
            raise TypeError(
                f"{name}: field must be a torch.nn.Module, so that its parameters are registered; got a function that "
                f"uses {type(networks[0]).__name__}"
            )
        self.field = field
        self.horizon = horizon


class FluxMatching(LossModule):
    """Flux Matching at one noise level, `flux_matching_loss` as a module.

    Args:
        field: f(z), a module or function.
        options: see `FluxOptions`; no learned horizon, which needs a normalized loss.
    """

    field: Field

    def __init__(self, field: Field, options: FluxOptions = FluxOptions()) -> None:
        check_options("FluxMatching", options, FluxOptions)
        if options.horizon is not None and options.horizon.learned:
            raise ValueError("FluxMatching: a learned horizon needs NoiseAnnealedFluxMatching, which normalizes")
        super().__init__(field, options.horizon)
        self.options = options

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *,
        refs: Tensor | None = None,
        draws: Draws | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "tau"}. Arguments as in `flux_matching_loss`."""
        target = flux_target(self.field, x, sigma, self.options, refs=refs, draws=draws, seed=seed)
        loss = target.loss(self.field).mean()
        return loss, {"loss": loss.detach(), "tau": target.tau}


class NoiseAnnealedFluxMatching(LossModule):
    """Noise-annealed Flux Matching, `noise_annealed_flux_loss` as a module.

    Args:
        field: f(z, σ), a module or function.
        options: see `FluxOptions`. A learned horizon becomes a submodule.
        normalizer: s_η; None makes a `LossNormalizer`.
    """

    field: NoisyField

    def __init__(
        self, field: NoisyField, options: FluxOptions = FluxOptions(), *, normalizer: LossNormalizer | None = None
    ) -> None:
        check_options("NoiseAnnealedFluxMatching", options, FluxOptions)
        super().__init__(field, options.horizon)
        self.normalizer = LossNormalizer() if normalizer is None else normalizer
        self.options = options

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *,
        refs: Tensor | None = None,
        draws: Draws | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "flux", "tau", "sigma"}, flux the mean of ℓ before normalization.

        Arguments as in `noise_annealed_flux_loss`.
        """
        terms = annealed_terms(self.field, x, sigma, self.normalizer, self.options, refs=refs, draws=draws, seed=seed)
        loss = terms.total.mean()
        logged = {"loss": loss.detach(), "flux": terms.flux.mean(), "tau": terms.tau, "sigma": terms.sigma.detach()}
        return loss, logged


class DenoisingScoreMatching(LossModule):
    """Denoising score matching, `dsm_loss` as a module.

    Args:
        field: f(z), a module or function.
        options: see `DSMOptions`.
    """

    field: Field

    def __init__(self, field: Field, options: DSMOptions = DSMOptions()) -> None:
        check_options("DenoisingScoreMatching", options, DSMOptions)
        super().__init__(field)
        self.options = options

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *,
        refs: Tensor | None = None,
        draws: Draws | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss"}. Arguments as in `dsm_loss`."""
        loss = dsm_loss(self.field, x, sigma, self.options, refs=refs, draws=draws, seed=seed).mean()
        return loss, {"loss": loss.detach()}
