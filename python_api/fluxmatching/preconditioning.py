"""Networks as fields f(z, σ): EDM preconditioning, and the UNet of the image experiments around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EDMField(nn.Module):
    """f(z, σ) = (D(z; σ) - z)/σ² with the preconditioned denoiser D of Karras et al. (2022, Table 1).

    D = c_skip z + c_out F(c_in z, c_noise), where c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²),
    c_in = 1/√(σ² + σ_d²), c_noise = log σ / 4. Written out,

        f = (σ_d F / σ - z / √(σ² + σ_d²)) / √(σ² + σ_d²),

    in which nothing cancels at small σ.

    Args:
        network: F(x, c_noise), x `[n, *event]` and c_noise `[n]`; returns the shape of x.
        sigma_data: σ_d > 0, the standard deviation of the data.

    Shape:
        z `[n, *event]`, σ > 0 `[]` or `[n]`; returns the shape of z.

    Raises:
        ValueError: sigma_data is not positive, or σ has another shape.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"EDMField: sigma_data must be positive and finite, got {sigma_data}")
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = torch.as_tensor(sigma, device=z.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(z)):
            raise ValueError(f"EDMField: sigma must be one number or one a sample, got shape {list(sigma.shape)}")
        sigma = sigma.to(z).expand(len(z))
        per_sample = sigma.reshape(-1, *(1 for _ in z.shape[1:]))
        norm = (per_sample.square() + self.sigma_data**2).sqrt()
        output = self.network(z / norm, sigma.log() / 4)
        return (self.sigma_data / per_sample * output.to(z.dtype) - z / norm) / norm


class UNet(nn.Module):
    """diffusers' `UNet2DModel` as F(x, c_noise) of `EDMField`; the defaults are those of the paper's Table 3.

    Args:
        size: height and width of the images, a multiple of 2^(len(multipliers) - 1).
        channels: of the images.
        width: channels of the first level.
        multipliers: of width, one a level; each level halves the resolution.
        attention: resolutions with self-attention.
        blocks: residual blocks a level.
        dropout: probability.
        options: further arguments of `UNet2DModel`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: size cannot be halved that often, no level has a resolution of `attention`, or width is no multiple
            of the groups of GroupNorm (`norm_num_groups`, 32).
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        *,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        attention: tuple[int, ...] = (16,),
        blocks: int = 2,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError as error:
            raise ImportError("fluxmatching.UNet needs diffusers: pip install 'fluxkernels[images]'") from error
        levels = len(multipliers)
        if size % 2 ** (levels - 1):
            raise ValueError(f"UNet: size must be a multiple of {2 ** (levels - 1)}, got {size}")
        resolutions = [size // 2**level for level in range(levels)]
        if missing := set(attention) - set(resolutions):
            raise ValueError(
                f"UNet: attention must be at resolutions of its levels, {resolutions}, got {sorted(missing)}"
            )
        groups = options.get("norm_num_groups", 32)
        if width % groups:
            raise ValueError(
                f"UNet: width must be a multiple of norm_num_groups, the groups of its GroupNorm layers, got {width} "
                f"and {groups}"
            )
        down = tuple("AttnDownBlock2D" if r in attention else "DownBlock2D" for r in resolutions)
        model: Any = diffusers.UNet2DModel  # loaded when asked for, which type checkers do not see
        self.model = model(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(width * m for m in multipliers),
            layers_per_block=blocks,
            down_block_types=down,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
            dropout=dropout,
            **options,
        )

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        # Its sinusoidal embedding is made for steps up to 1000; log σ / 4 lies within ±2.
        return self.model(x, 1000 * c_noise, return_dict=False)[0]
