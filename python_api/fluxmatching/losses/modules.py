"""Losses as modules: what an optimizer or a training engine wraps.

A module holds the field, its noise levels and everything else that is learned. `forward(x, seed=...)` returns the mean
loss and a dictionary to log. One call and one backward pass make a training step, so every engine can wrap it:
DistributedDataParallel, FSDP, Fabric, Lightning, Accelerate. Inside, the field is called unwrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor, nn

from fluxkernels import philox
from fluxkernels.checks import as_number_tensor, check_positive, check_seed, check_tensor
from fluxmatching.distributed import rank_and_size, rank_seed, shared_seed
from fluxmatching.engines import network_inside
from fluxmatching.field_modules import check_field
from fluxmatching.fields import Field, NoisyField, call_field
from fluxmatching.losses.annealed import LossNormalizer, annealed_terms
from fluxmatching.losses.dsm import DSMOptions, dsm_loss
from fluxmatching.losses.dual import Features, as_families, dual_flux_loss
from fluxmatching.losses.noise_levels import LogNormalNoise
from fluxmatching.losses.options import FluxOptions, check_options
from fluxmatching.losses.reference_set import ReferenceSet
from fluxmatching.losses.smoothing import effective_centers
from fluxmatching.losses.target import FluxTarget, build_target

Logged = dict[str, Tensor]
# First samples of a minibatch, at which effective centers are counted: few, since every step does it.
POINTS_OF_CENTERS = 32


class NoiseLevels(Protocol):
    """Distribution of σ, such as `LogNormalNoise` and `LogUniformNoise`."""

    def quantile(self, uniform: Tensor, /) -> Tensor:
        """Return σ with P(σ' ≤ σ) = uniform, elementwise."""


class LossModule(nn.Module):
    """Base of the loss modules: one module for an optimizer or engine, with everything that is learned.

    Args:
        field: a module, or a function without parameters.
        horizon: horizon of the options, or None.
        refs: reference points, see `ReferenceSet`.
        gather_across_ranks: whether all processes share the random numbers of a seed. Otherwise each process draws
            its own from it.

    Raises:
        TypeError: the field is a function that uses a network; its parameters would not be registered.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        horizon: nn.Module | None = None,
        refs: Tensor | int | None = None,
        gather_across_ranks: bool = False,
    ) -> None:
        super().__init__()
        check_field(type(self).__name__, "field", field)
        self.field = field
        self.horizon = horizon
        self.refs = ReferenceSet(refs)
        self.gather_across_ranks = gather_across_ranks

    def joint_samples(self, x: Tensor) -> int:
        """Return the number of samples of all processes whose minibatches are joined."""
        return len(x) * (rank_and_size()[1] if self.gather_across_ranks else 1)

    def key(self, x: Tensor, seed: int | Tensor | None) -> Tensor:
        """Return the seed of this call, an int64 tensor `[]`; None draws one from torch's generator."""
        name = type(self).__name__
        check_tensor(name, "x", x)
        if x.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name}: x must be float32 or float64, got {x.dtype}; Fabric's mixed precision rounds the data, "
                f"Fabric(plugins=[fluxmatching.training.mixed_precision('bf16-mixed', 'cuda')]) the network only"
            )
        check_seed(name, seed)
        rank, processes = rank_and_size()
        if self.gather_across_ranks and processes > 1:
            return shared_seed(name, seed, x.device)
        # Also where torch draws it: all processes may have called torch.manual_seed with the same number.
        return rank_seed(philox.as_seed(seed, x.device), rank)


class FluxMatching(LossModule):
    """Flux Matching at one noise level, `flux_matching_loss` as a module.

    Args:
        field: f(z), a module or function.
        sigma: σ > 0 in units of x; grouped: or one per group, `[G]`.
        options: see `FluxOptions`; no learned horizon, which needs a normalized loss.
        refs: reference points, see `ReferenceSet`; default: the minibatch.
    """

    field: Field
    sigma: float | Tensor

    def __init__(
        self,
        field: Field,
        sigma: float | Tensor,
        options: FluxOptions = FluxOptions(),
        *,
        refs: Tensor | int | None = None,
    ) -> None:
        check_options("FluxMatching", options, FluxOptions)
        if options.horizon is not None and options.horizon.learned:
            raise ValueError("FluxMatching: a learned horizon needs NoiseAnnealedFluxMatching, which normalizes")
        super().__init__(field, options.horizon, refs, options.gather_across_ranks)
        _keep_sigma(self, sigma)
        self.options = options

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "tau", "effective_centers"}.

        The last is the mean of `fluxmatching.effective_centers` at 32 starts of chains.

        Args:
            x: clean minibatch, `[N, *event]`, float32 or float64; grouped: `[N, G, D]`.
            seed: determines all random numbers, except those of dropout. None draws one from torch's generator.
        """
        key = self.key(x, seed)
        name, refs = "flux_matching_loss", self.refs(x)
        target = build_target(name, self.field, x, self.sigma, self.options, refs=refs, seed=key)
        loss = target.loss(self.field).mean()
        centers = _mean_centers(target, self.options)
        return loss, {"loss": loss.detach(), "tau": target.tau.mean(), "effective_centers": centers}


class NoiseAnnealedFluxMatching(LossModule):
    """Noise-annealed Flux Matching, `noise_annealed_flux_loss` as a module with random σ, one per stratum.

    Args:
        field: f(z, σ), a module or function. With `accepts_sigma_per_sample = True` it receives one σ per sample, and
            the minibatch is cut into up to 16 strata.
        noise: distribution of σ; default: that of EDM, `LogNormalNoise()`.
        options: see `FluxOptions`. A learned horizon becomes a submodule.
        normalizer: s_η; None makes a `LossNormalizer`.
        refs: reference points, see `ReferenceSet`; default: the minibatch.
    """

    field: NoisyField

    def __init__(
        self,
        field: NoisyField,
        noise: NoiseLevels | None = None,
        options: FluxOptions = FluxOptions(),
        *,
        normalizer: LossNormalizer | None = None,
        refs: Tensor | int | None = None,
    ) -> None:
        check_options("NoiseAnnealedFluxMatching", options, FluxOptions)
        super().__init__(field, options.horizon, refs, options.gather_across_ranks)
        self.noise = _check_noise("NoiseAnnealedFluxMatching", LogNormalNoise() if noise is None else noise)
        self.normalizer = LossNormalizer() if normalizer is None else normalizer
        self.options = options

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "flux", "tau", "sigma"}, flux the mean of ℓ before normalization.

        Args:
            x: clean minibatch, `[N, *event]`, float32 or float64.
            seed: determines all random numbers, except those of dropout. None draws one from torch's generator.
        """
        key = self.key(x, seed)
        options = self.options.with_strata(self._strata(self.joint_samples(x)))
        sigma = draw_from(self.noise, key, x, philox.NOISE_LEVEL, options.strata or 1)
        terms = annealed_terms(self.field, x, sigma, self.normalizer, options, refs=self.refs(x), seed=key)
        loss = terms.total.mean()
        return loss, {
            "loss": loss.detach(), "flux": terms.flux.mean(), "tau": terms.tau.mean(), "sigma": sigma.mean(),
        }  # fmt: skip

    def _strata(self, samples: int) -> int:
        """Return how many strata a minibatch has by default."""
        if not takes_sigma_per_sample(self.field):
            return 1
        return strata_for(samples)


class DenoisingScoreMatching(LossModule):
    """Denoising score matching, `dsm_loss` as a module, at one noise level or over a distribution of them.

    Args:
        field: f(z) at one noise level, f(z, σ) over a distribution; a module or function.
        noise: σ > 0, or its distribution.
        options: see `DSMOptions`.
        normalizer: s_η(σ), which weights the noise levels; None leaves the weights of `DSMOptions.form`.
        sigma_per_sample: whether every sample has a σ of its own, so that the field receives `[N]`; False draws one per
            minibatch. None: if the field has `accepts_sigma_per_sample`, such as `EDMField`.
        refs: reference points of the stable target, see `ReferenceSet`; default: the minibatch.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        noise: float | Tensor | NoiseLevels,
        options: DSMOptions = DSMOptions(),
        *,
        normalizer: LossNormalizer | None = None,
        sigma_per_sample: bool | None = None,
        refs: Tensor | int | None = None,
    ) -> None:
        check_options("DenoisingScoreMatching", options, DSMOptions)
        super().__init__(field, refs=refs)
        self.noise = None if isinstance(noise, (float, Real, Tensor)) else _check_noise("DenoisingScoreMatching", noise)
        if self.noise is None:
            _keep_sigma(self, noise)
        self.sigma_per_sample = takes_sigma_per_sample(field) if sigma_per_sample is None else sigma_per_sample
        if normalizer is not None and not callable(normalizer):
            raise TypeError(f"DenoisingScoreMatching: normalizer must be callable, got {type(normalizer).__name__}")
        self.normalizer, self.options = normalizer, options

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "dsm", "sigma"}, dsm before normalization, sigma the mean σ.

        Args:
            x: clean minibatch, `[N, *event]`.
            seed: determines all random numbers, except those of dropout. None draws one from torch's generator.
        """
        key = self.key(x, seed)
        if self.noise is None:
            field, sigma = self.field, as_number_tensor("DenoisingScoreMatching", "sigma", self.sigma, like=x)
        else:
            sigma = draw_from(self.noise, key, x, philox.NOISE_LEVEL, len(x) if self.sigma_per_sample else 1)
            field = lambda z: call_field(self.field, z, sigma)  # noqa: E731
        values = dsm_loss(field, x, sigma, self.options, refs=self.refs(x), seed=key)
        loss = (values if self.normalizer is None else self.normalizer(values, sigma)).mean()
        return loss, {"loss": loss.detach(), "dsm": values.detach().mean(), "sigma": sigma.mean()}


class DualFluxMatching(LossModule):
    """The dual of Flux Matching for data without noise, `dual_flux_loss` as a module.

    Args:
        field: f(x), a module or function.
        features: a family of test functions, or several, such as `[LinearFeatures(), QuadraticFeatures()]`.
        ridge, halves: see `dual_flux_loss`.
        refs: more data for the test functions, see `ReferenceSet`; default: the minibatch. That makes the loss too
            large unless it has many more samples than there are test functions.
    """

    def __init__(
        self,
        field: Field,
        features: Features | Sequence[Features],
        *,
        ridge: float = 0.01,
        halves: bool = True,
        refs: Tensor | int | None = None,
    ) -> None:
        name = "DualFluxMatching"
        super().__init__(field, refs=refs)
        self.features, self.ridge = as_families(name, features), check_positive(name, "ridge", ridge)
        if not isinstance(halves, bool):
            raise TypeError(f"{name}: halves must be True or False, got {halves!r}")
        self.halves = halves

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss"}.

        Args:
            x: minibatch in random order, `[N, *event]`, float32 or float64.
            seed: for engines, which give one to every loss; this one draws nothing.
        """
        check_seed("DualFluxMatching", seed)
        refs = self.refs(x)
        values = dual_flux_loss(self.field, x, self.features, refs=refs, ridge=self.ridge, halves=self.halves)
        loss = values.mean()
        return loss, {"loss": loss.detach()}


def _mean_centers(target: FluxTarget, options: FluxOptions) -> Tensor:
    """Return the mean of `effective_centers` over some starts of chains, and over groups, `[]`."""
    points, sigma = target.x0[:POINTS_OF_CENTERS], target.sigma
    if options.grouped:
        points = points.transpose(0, 1)
    else:
        points, sigma = points.flatten(1), sigma[:POINTS_OF_CENTERS] if sigma.ndim else sigma
    return effective_centers(points, target.refs, sigma, backend=options.backend).mean()


def takes_sigma_per_sample(field: object) -> bool:
    """Return whether a field declares that f(z, σ) takes one σ per sample, `[n]`, and not only one number.

    It cannot be tried: z/σ of a field that knows one number only is wrong without an error for some shapes.
    """
    return bool(getattr(network_inside(field), "accepts_sigma_per_sample", False))


def strata_for(samples: int) -> int:
    """Return how many strata a minibatch has by default: up to 16, of at least 8 samples, so that chains share."""
    return next((count for count in (16, 8, 4, 2) if samples % count == 0 and samples >= 8 * count), 1)


def draw_from(distribution: NoiseLevels, key: Tensor, x: Tensor, stream: int, count: int = 1) -> Tensor:
    """Draw σ or t from a seed, on the device of x: `[]`; or `[count]`, one from each of as many equal intervals.

    The intervals are equally probable and in random order: else a sample that is always in the same row would always
    get the same one.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    uniform = philox.uniform(key, (1, count), stream, dtype)[0]
    if count == 1:
        return distribution.quantile(uniform[0])
    interval = philox.uniform(key, (1, count), philox.ORDER, torch.float32)[0].argsort(stable=True)
    # In float64, and not rounded to 1 in float32 afterwards.
    position = ((interval + uniform.double()) / count).clamp_max(1 - 2.0**-24)
    return distribution.quantile(position.to(dtype))


def _check_noise(name: str, noise: NoiseLevels) -> NoiseLevels:
    if isinstance(noise, type) or not callable(getattr(noise, "quantile", None)):
        raise TypeError(
            f"{name}: noise must be a distribution of σ with a method quantile, such as LogNormalNoise(), got {noise!r}"
        )
    return noise


def _keep_sigma(module: nn.Module, sigma: object) -> None:
    """Keep a fixed σ; a tensor as a buffer, so that it moves with the module."""
    if isinstance(sigma, Tensor):
        module.register_buffer("sigma", sigma.detach(), persistent=False)
    else:
        module.sigma = sigma  # type: ignore[assignment]
