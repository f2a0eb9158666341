"""Noise levels: distributions of σ in training, and the learned affine map of log σ."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_sigma_range
from fluxkernels.devices import no_autocast


class LogNormalNoise:
    """Log-normal distribution, log σ ~ N(mean, std²): that of EDM (Karras et al. 2022, Table 1).

    Args:
        mean: mean of log σ.
        std: standard deviation of log σ, positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"LogNormalNoise: mean and std must be finite and std positive, got {mean} and {std}")
        self.mean, self.std = mean, std

    def sample(
        self,
        shape: tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw σ of that shape, float32, on `device`; None takes that of the generator, or the CPU without one."""
        return (self.mean + self.std * torch.randn(shape, **_source(generator, device))).exp()

    def quantile(self, uniform: Tensor) -> Tensor:
        """Return σ with P(σ' ≤ σ) = uniform, elementwise."""
        return (self.mean + self.std * torch.special.ndtri(uniform)).exp()


class LogUniformNoise:
    """Log-uniform distribution on [sigma_min, sigma_max]: that of variance-exploding training (Table 6).

    Args:
        sigma_min, sigma_max: ends of the range, 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        check_sigma_range("LogUniformNoise", sigma_min, sigma_max)
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)

    def sample(
        self,
        shape: tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw σ of that shape, float32, on `device`; None takes that of the generator, or the CPU without one."""
        return (self.low + (self.high - self.low) * torch.rand(shape, **_source(generator, device))).exp()

    def quantile(self, uniform: Tensor) -> Tensor:
        """Return σ with P(σ' ≤ σ) = uniform, elementwise."""
        return (self.low + (self.high - self.low) * uniform).exp()


def _source(generator: torch.Generator | None, device: torch.device | str | None) -> dict[str, Any]:
    """Arguments of a random function of PyTorch, whose own default is the default device."""
    if device is None:
        device = "cpu" if generator is None else generator.device
    return {"generator": generator, "device": device, "dtype": torch.float32}


class LinearInLogSigma(nn.Module):
    """Affine function of log σ in the published form: two linear maps of log σ / 4 without an activation.

    Args:
        hidden: width between the two maps.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be a positive number of units, got {hidden}")
        self.first, self.second = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, sigma: Tensor) -> Tensor:
        """Return the shape of sigma, in the dtype and on the device of the parameters."""
        features = sigma.to(self.first.weight).log().unsqueeze(-1) / 4
        with no_autocast(features.device):  # bfloat16 has steps of 1/16 at s = 9
            return self.second(self.first(features)).squeeze(-1)
