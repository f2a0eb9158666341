"""Gaussian paths from noise to data, x_t = α(t) x1 + σ(t) x0, and what the predictions along them mean.

x1 is a sample of the data, x0 standard normal noise (or a sample of any source), t = 0 the start and t = 1 the data.
Four predictions are equivalent, since x determines the others from one of them:

    velocity v   the marginal velocity E[α' x1 + σ' x0 | x]
    denoiser D   the posterior mean E[x1 | x]
    noise ε      E[x0 | x], so that x = α D + σ ε
    score s      ∇ log p_t(x) = -ε/σ, for normal x0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fluxkernels.checks import can_check_values, check_choice, check_sigma_range, check_tensor, shape_of
from fluxmatching.fields import per_sample

PREDICTIONS = ("velocity", "score", "noise", "denoiser")


class Coefficients(NamedTuple):
    """Numbers of a path at times t, each in the shape of t, float64.

    Attributes:
        alpha, sigma: α(t) and σ(t), both at least 0.
        alpha_rate, sigma_rate: their derivatives α'(t) and σ'(t).
        sigma_sigma_rate: σ σ', half of the derivative of σ². It is finite where σ' is not.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor
    sigma_sigma_rate: Tensor

    def reshape_for(self, x: Tensor) -> Coefficients:
        """Return the numbers in the dtype of x, shaped to broadcast against x `[N, *event]`."""
        return Coefficients(*(per_sample(number.to(x.dtype), x) for number in self))

    @property
    def linear(self) -> Tensor:
        """a = α'/α of the marginal velocity v(x) = a x + b s(x)."""
        return self.alpha_rate / self.alpha

    @property
    def score(self) -> Tensor:
        """b = σ² α'/α - σ σ' of the marginal velocity v(x) = a x + b s(x)."""
        return self.sigma.square() * self.linear - self.sigma_sigma_rate


class Path:
    """Base of the paths. A path of one's own defines `coefficients`."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ and their derivatives at times in [0, 1], float64 of any shape."""
        raise NotImplementedError

    def at(self, function: str, t: float | Tensor, x: Tensor) -> Coefficients:
        """Return the coefficients at checked times, `[]` or one per sample, shaped to broadcast against x."""
        return self.coefficients(check_times(function, t, x).double()).reshape_for(x)

    def sample(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """Return x_t = α(t) x1 + σ(t) x0.

        Args:
            x0: samples of the source, `[N, *event]`.
            x1: samples of the data, shape of x0.
            t: times in [0, 1]: one number, or one per sample, `[N]`.

        Returns:
            `[N, *event]`.
        """
        check_pairs("Path.sample", x0, x1)
        c = self.at("Path.sample", t, x1)
        return c.alpha * x1 + c.sigma * x0

    def conditional_velocity(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """Return d x_t/dt = α'(t) x1 + σ'(t) x0, of which the marginal velocity is the mean given x_t.

        Arguments as in `sample`.

        Raises:
            ValueError: σ' is infinite at t; see `VariancePreservingPath`.
        """
        function = "Path.conditional_velocity"
        check_pairs(function, x0, x1)
        c = self.at(function, t, x1)
        _check_determined(function, c.sigma_rate.isfinite(), "the velocity is infinite", t)
        return c.alpha_rate * x1 + c.sigma_rate * x0

    def convert(self, prediction: Tensor, x: Tensor, t: float | Tensor, *, source: str, target: str) -> Tensor:
        """Convert one of the predictions velocity, score, noise and denoiser at (x, t) to another.

        With W = σ α' - α σ' they are connected by x = α D + σ ε, v = α' D + σ' ε, s = -ε/σ, and hence

            D = (σ v - σ' x)/W,  ε = (α' x - α v)/W,  v = (α'/α) x + (σ² α'/α - σ σ') s.

        At σ = 0 the noise of a sample is lost, and at α = 0 the data are: there ε = 0 at x = α D, or D is arbitrary.
        Conversions that are determined have their limit as value.

        Args:
            prediction: `[N, *event]`.
            x: x_t, shape of the prediction.
            t: times in [0, 1]: one number, or one per sample, `[N]`.
            source: what the prediction is: "velocity", "score", "noise" or "denoiser".
            target: what to return.

        Returns:
            `[N, *event]`.

        Raises:
            ValueError: the prediction does not determine the result at t, such as a velocity from the score where
                α = 0. Not checked on an accelerator, where the result is NaN or infinite.
        """
        function = "Path.convert"
        check_choice(function, "source", source, PREDICTIONS)
        check_choice(function, "target", target, PREDICTIONS)
        check_tensor(function, "x", x)
        if check_tensor(function, "prediction", prediction, like=x).shape != x.shape:
            raise ValueError(
                f"{function}: prediction must have the shape of x, {shape_of(x)}, got {shape_of(prediction)}"
            )
        if source == target:
            return prediction
        c = self.at(function, t, x)
        _check_determined(function, _is_determined(c, source, target), f"{source} does not determine {target}", t)
        if (source, target) == ("score", "velocity"):
            return c.linear * x + c.score * prediction
        if (source, target) == ("velocity", "score"):
            return (c.alpha * prediction - c.alpha_rate * x) / (
                c.sigma.square() * c.alpha_rate - c.alpha * c.sigma_sigma_rate
            )
        return _from_parts(c, *_parts(c, prediction, x, source), target)


def _parts(c: Coefficients, prediction: Tensor, x: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Return (D, ε) of a prediction at x."""
    if source == "denoiser":
        noise = (x - c.alpha * prediction) / c.sigma
        return prediction, torch.where(c.sigma > 0, noise, torch.zeros_like(noise))
    if source == "velocity":
        # Both sides of a quotient times σ where σ' is infinite.
        finite = c.sigma_rate.isfinite()
        one = torch.where(finite, torch.ones_like(c.sigma), c.sigma)
        sigma_rate = torch.where(finite, c.sigma_rate, c.sigma_sigma_rate)
        both = c.sigma * one * c.alpha_rate - c.alpha * sigma_rate
        return (
            (c.sigma * one * prediction - sigma_rate * x) / both,
            one * (c.alpha_rate * x - c.alpha * prediction) / both,
        )
    noise = prediction if source == "noise" else -c.sigma * prediction
    return (x - c.sigma * noise) / c.alpha, noise


def _from_parts(c: Coefficients, denoised: Tensor, noise: Tensor, target: str) -> Tensor:
    if target == "velocity":
        return c.alpha_rate * denoised + c.sigma_rate * noise
    if target == "score":
        return -noise / c.sigma
    return noise if target == "noise" else denoised


def _is_determined(c: Coefficients, source: str, target: str) -> Tensor:
    """Return whether the prediction `source` determines `target`, for every time."""
    has_noise, has_data = c.sigma > 0, c.alpha > 0
    always = torch.ones_like(has_noise)
    if source == "velocity":
        return has_noise | ~c.sigma_rate.isfinite() if target == "score" else always
    if source == "denoiser":
        return always if target == "noise" else has_noise if target == "score" else has_noise | c.sigma_rate.isfinite()
    if target == "velocity":
        return has_data & (always if source == "score" else c.sigma_rate.isfinite())
    if target == "denoiser":
        return has_data
    return has_noise if target == "score" else always


def _check_determined(function: str, determined: Tensor, what: str, t: float | Tensor) -> None:
    if can_check_values(determined) and not determined.all():
        times = t if isinstance(t, Tensor) else torch.tensor(float(t), device="cpu")
        times = times.expand(determined.shape[0]) if determined.shape[0] > 1 else times
        bad = times.reshape(-1)[~determined.reshape(-1)][0].item()
        raise ValueError(f"{function}: {what} at t = {bad:g}")


@dataclass(frozen=True)
class LinearPath(Path):
    """Linear interpolation, α = t and σ = 1 - (1 - σ_min) t (Lipman et al. 2023, there called optimal transport).

    Attributes:
        sigma_min: σ_min ≥ 0, the standard deviation around a sample at t = 1.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"LinearPath: sigma_min must lie in [0, 1), got {self.sigma_min}")

    def coefficients(self, t: Tensor) -> Coefficients:
        sigma = (1 - t) + self.sigma_min * t
        rate = torch.full_like(t, self.sigma_min - 1)
        return Coefficients(t, sigma, torch.ones_like(t), rate, sigma * rate)


@dataclass(frozen=True)
class CosinePath(Path):
    """Trigonometric interpolation, α = sin(πt/2) and σ = cos(πt/2): data of variance 1 keep it along the path."""

    def coefficients(self, t: Tensor) -> Coefficients:
        alpha, sigma = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))  # exactly 0 at the ends
        rate = math.pi / 2
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha, -rate * alpha * sigma)


@dataclass(frozen=True)
class VariancePreservingPath(Path):
    """Path of the variance-preserving diffusion: log α = -½ ∫ β over the time 1 - t, σ² = 1 - α² (Lipman et al. 2023).

    β grows linearly from beta_min at the data to beta_max at the noise. At t = 1 σ' is infinite, σσ' is not: the
    marginal velocity follows from the score there, but not from the noise or the denoiser. α(0) is not 0, but
    exp(-(β_min + β_max)/4).

    Attributes:
        beta_min, beta_max: β at t = 1 and t = 0, 0 < beta_min < beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"VariancePreservingPath: 0 < beta_min < beta_max must hold, got {self.beta_min} and {self.beta_max}"
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        time, slope = 1 - t, self.beta_max - self.beta_min
        log_alpha = -time * (self.beta_min / 2 + slope / 4 * time)
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        alpha_rate = (self.beta_min + slope * time) / 2 * alpha
        product = -alpha * alpha_rate
        return Coefficients(alpha, sigma, alpha_rate, product / sigma, product)


@dataclass(frozen=True)
class VarianceExplodingPath(Path):
    """Path of the variance-exploding diffusion, α = 1 and σ = σ_max (σ_min/σ_max)^t.

    Attributes:
        sigma_min, sigma_max: σ at t = 1 and t = 0, 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_sigma_range("VarianceExplodingPath", self.sigma_min, self.sigma_max)

    def coefficients(self, t: Tensor) -> Coefficients:
        log_ratio = math.log(self.sigma_min / self.sigma_max)
        sigma = self.sigma_max * (log_ratio * t).exp()
        rate = log_ratio * sigma
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), rate, sigma * rate)


def check_path(function: str, path: object) -> Path:
    """Return `path` if it is a `Path`."""
    if not isinstance(path, Path):
        raise TypeError(f"{function}: path must be a Path, such as LinearPath(), got {path!r}")
    return path


def check_times(function: str, t: float | Tensor, x: Tensor, name: str = "t") -> Tensor:
    """Return times in [0, 1], `[]` or one per sample of x, `[N]`, on the device of x.

    Raises:
        TypeError, ValueError: they are no numbers, have another shape, or lie outside of [0, 1].
    """
    if isinstance(t, bool) or not isinstance(t, (Real, Tensor)):
        raise TypeError(f"{function}: {name} must be a number or a tensor of times, got {type(t).__name__}")
    if not isinstance(t, Tensor):
        if not 0 <= t <= 1:
            raise ValueError(f"{function}: {name} must lie in [0, 1], got {float(t):g}")
        return torch.full((), float(t), dtype=torch.float64, device=x.device)  # a copy would make the host wait
    times = t
    if not times.is_floating_point():
        raise TypeError(f"{function}: {name} must be a floating tensor, got {times.dtype}")
    if times.ndim and times.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: {name} must be one number or one per sample, shape {[x.shape[0]]}, got {shape_of(times)}"
        )
    if times.device != x.device and times.ndim:
        raise ValueError(f"{function}: {name} must be on {x.device} like x, got {times.device}")
    if can_check_values(times) and not ((times >= 0) & (times <= 1)).all():
        bad = times.detach().reshape(-1)
        bad = bad[~((bad >= 0) & (bad <= 1))]
        raise ValueError(f"{function}: {name} must lie in [0, 1], got {bad[0].item():g}")
    return times.to(x.device)


def check_pairs(function: str, x0: object, x1: object) -> None:
    """Raise TypeError or ValueError unless x0 and x1 are pairs of samples `[N, *event]`."""
    check_tensor(function, "x1", x1)
    assert isinstance(x1, Tensor)
    check_tensor(function, "x0", x0, like=x1)
    assert isinstance(x0, Tensor)
    if x1.ndim < 2:
        raise ValueError(f"{function}: x1 must have shape [N, *event], got {shape_of(x1)}")
    if x0.shape != x1.shape:
        raise ValueError(f"{function}: x0 must have the shape of x1, {shape_of(x1)}, got {shape_of(x0)}")
