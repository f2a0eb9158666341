"""Networks of about equal size: a UNet, and transformers that differ in the pixels of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.architectures.problem import SIZE
from fluxmatching import UNet
from fluxmatching.networks import Block, TrajectoryTransformer, sinusoids

UNET, ROWS = "UNet", "rows"
PATCH_1, PATCH_2, PATCH_4, PATCH_4_CONV = "patch 1", "patch 2", "patch 4", "patch 4, convolution"


class PatchTransformer(nn.Module):
    """F(x, c_noise) of `fluxmatching.EDMField` for images: a transformer with one token per square patch.

    Args:
        patch: pixels of a side of a patch.
        width: size of the hidden representation, a multiple of 4.
        blocks: number of residual blocks.
        heads: number of heads of self-attention.
        convolution: whether a 3 × 3 convolution over the pixels comes last, as in U-ViT.

    Shape:
        x `[n, 1, 8, 8]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, patch: int, *, width: int, blocks: int, heads: int, convolution: bool = False) -> None:
        super().__init__()
        side = SIZE // patch
        axis = sinusoids(side, width // 2)
        place = torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], 1)
        self.place = nn.Parameter(place)
        self.cut = nn.PixelUnshuffle(patch)
        self.token = nn.Linear(patch * patch, width)
        self.noise = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(blocks)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, patch * patch))
        self.join = nn.PixelShuffle(patch)
        self.last = nn.Conv2d(1, 1, 3, padding=1) if convolution else nn.Identity()

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        patches = self.cut(x)
        hidden = self.token(patches.flatten(2).transpose(1, 2)) + self.place + self.noise(c_noise[:, None])[:, None]
        pixels = self.out(self.blocks(hidden)).transpose(1, 2).reshape(patches.shape)
        return self.last(self.join(pixels))


class RowTransformer(nn.Module):
    """The transformer of the springs with one token per row of an image in place of one per point of time.

    Args:
        width, blocks, heads: see `TrajectoryTransformer`.

    Shape:
        x `[n, 1, 8, 8]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, *, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.rows = TrajectoryTransformer(SIZE, SIZE, width=width, blocks=blocks, heads=heads)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.rows(x.squeeze(1), c_noise).unsqueeze(1)


@dataclass(frozen=True)
class Architecture:
    """A network, and what of it matters for its derivatives.

    Attributes:
        make: (width of the UNet, options of a transformer) -> the network.
        token: height and width of the pixels of a token, or of the cells of the UNet's coarser level.
    """

    make: Callable[[int, dict[str, int]], nn.Module]
    token: tuple[int, int]


def _unet(width: int, options: dict[str, int]) -> nn.Module:
    return UNet(
        SIZE, 1, width=width, multipliers=(1, 2), attention=(SIZE // 2,), blocks=1, dropout=0.0, norm_num_groups=8
    )


def _patches(patch: int, convolution: bool = False) -> Architecture:
    return Architecture(lambda _, options: PatchTransformer(patch, convolution=convolution, **options), (patch, patch))


ARCHITECTURES = {
    UNET: Architecture(_unet, (2, 2)),
    PATCH_1: _patches(1),
    PATCH_2: _patches(2),
    PATCH_4: _patches(4),
    PATCH_4_CONV: _patches(4, convolution=True),
    ROWS: Architecture(lambda _, options: RowTransformer(**options), (1, SIZE)),
}
