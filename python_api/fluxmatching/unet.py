"""UNet of the image experiments, a network for `EDMField`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class UNet(nn.Module):
    """UNet of diffusers (`UNet2DModel`) as F(x, c_noise) of `EDMField`; the defaults are those of the paper's Table 3.

    Args:
        size: height and width of the images, a multiple of 2^(len(multipliers) - 1).
        channels: channels of the images.
        width: channels of the first level.
        multipliers: multiple of width per level; each level halves the resolution.
        attention: resolutions with self-attention.
        blocks: residual blocks per level.
        dropout: probability of dropout.
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
