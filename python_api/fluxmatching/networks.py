"""Small networks F(x, c_noise) of `EDMField`: of points and of trajectories; `fluxmatching.UNet` is that of images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Perceptron(nn.Module):
    """F(x, c_noise) of `EDMField` in few dimensions: three hidden layers.

    Args:
        dim: number of dimensions D.
        width: width of the hidden layers.

    Shape:
        x `[n, D]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(self, dim: int = 2, width: int = 128) -> None:
        super().__init__()
        sizes = (dim + 1, width, width, width)
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None]], 1))


class Block(nn.Module):
    """Self-attention and a GELU network of four times the width, each behind a LayerNorm and with a skip connection."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.after_attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[n, length, width]` to the same shape."""
        heads = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.after_attention(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TrajectoryTransformer(nn.Module):
    """F(x, c_noise) of `EDMField` for trajectories: a transformer over physical time (B.5).

    One token per point of time, with full or causal attention.

    Args:
        length: points of a trajectory.
        state: numbers per point.
        width: size of the hidden representation.
        blocks: number of residual blocks.
        heads: number of heads of self-attention.
        causal: whether a point sees only itself and earlier points (Eq. 47).

    Shape:
        x `[n, length, state]`, c_noise `[n]`; returns the shape of x.
    """

    def __init__(
        self,
        length: int = 50,
        state: int = 4,
        *,
        width: int = 512,
        blocks: int = 12,
        heads: int = 8,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"TrajectoryTransformer: width must be a multiple of 2 heads, got {width} and {heads}")
        self.token = nn.Linear(state, width)
        self.noise = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("time", sinusoids(length, width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(blocks)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, state))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        hidden = self.token(x) + self.time + self.noise(c_noise[:, None])[:, None]
        return self.out(self.blocks(hidden))


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of the index at wavelengths from 2π to 2π·10⁴, `[length, width]`."""
    frequency = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
