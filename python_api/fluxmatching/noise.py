"""Noise levels: the distributions of σ in training, and maps of σ that are learned beside the network."""

import math

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_sigma_range


class LogNormalNoise:
    """log σ ~ N(mean, std²): EDM's training distribution (Karras et al. 2022, Table 1).

    Args:
        mean: of log σ.
        std: of log σ, positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"LogNormalNoise: mean and std must be finite and std positive, got {mean} and {std}")
        self.mean, self.std = mean, std

    def sample(self, shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """σ of that shape, float32 on the CPU."""
        return (self.mean + self.std * torch.randn(shape, generator=generator)).exp()


class LogUniformNoise:
    """log σ ~ U[log sigma_min, log sigma_max]: the variance-exploding training distribution (Table 6).

    Args:
        sigma_min, sigma_max: ends of the range, 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        check_sigma_range("LogUniformNoise", sigma_min, sigma_max)
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)

    def sample(self, shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """σ of that shape, float32 on the CPU."""
        return (self.low + (self.high - self.low) * torch.rand(shape, generator=generator)).exp()


class LinearInLogSigma(nn.Module):
    """Two linear maps of log σ / 4 without an activation: an affine function of log σ, in the published form.

    Args:
        hidden: width between the two maps.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be a positive number of units, got {hidden}")
        self.first, self.second = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, sigma: Tensor) -> Tensor:
        """Shape of sigma, in the parameters' dtype and on their device."""
        features = sigma.to(self.first.weight).log().unsqueeze(-1) / 4
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of 1/16 at s = 9
            return self.second(self.first(features)).squeeze(-1)


class LossNormalizer(nn.Module):
    """s_η(σ), which brings the losses of all noise levels to one scale (Eq. 11).

    Args:
        hidden: width of the hidden linear map.
    """

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.layer = LinearInLogSigma(hidden)

    def log_scale(self, sigma: Tensor) -> Tensor:
        """s_η(σ), shape of sigma."""
        return self.layer(sigma)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """loss / exp(s_η(σ)) + s_η(σ); least, on average, where exp(s_η(σ)) is the mean loss at σ.

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
