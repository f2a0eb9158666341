"""Words of points, and exact sums of them."""

from functools import cached_property

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host import limits
from fluxkernels.triton_kernels.fixed_point.host.products import exact_products, padded, tile_shape
from fluxkernels.triton_kernels.fixed_point.points import columns_kernel, extent_kernel, points_kernel
from fluxkernels.triton_kernels.launch import OPTIONS, launch, strided


class Points:
    """Words of queries (or vectors) and reference points of some groups, and their scales.

    Attributes:
        left, right: words `[B, N, width]` and `[B, M, width]`.
        exponents: of both, `[B, 2]`.
        halves: |r|²/2 in units of products, `[B, M]`.
        valid: 0, or NaN if a coordinate is not finite, `[B, N]`.
    """

    def __init__(
        self, x: Tensor, refs: Tensor, *, centered: bool = True, transition: tuple[Tensor, Tensor] | None = None
    ) -> None:
        (B, N, D), M = x.shape, refs.shape[1]
        device, width = x.device, padded(D)
        move, tau = transition or (refs, refs[:, 0, 0])
        inputs = strided(x, refs, move, tau)
        kind = {"CENTERED": centered, "MOVED": transition is not None}
        tile = tile_shape(max(N, M), width, limits.LARGE_TILE if M >= limits.LARGE_TILE else 1024)
        parts = min(limits.EXTENTS, -(-max(N, M) // tile["ROWS"]))
        extents = torch.empty((B, 2, parts), dtype=torch.float32, device=device)
        launch(extent_kernel, (B * parts,), *inputs, extents, N, M, D, parts, **kind, **tile)
        self.left = torch.empty((B, N, width), dtype=torch.int32, device=device)
        self.right = torch.empty((B, M, width), dtype=torch.int32, device=device)
        self.exponents = torch.empty((B, 2), dtype=torch.int32, device=device)
        self.halves = torch.empty((B, M), dtype=torch.int64, device=device)
        self.valid = torch.empty((B, N), dtype=torch.float32, device=device)
        tile = tile_shape(max(N, M), width)
        blocks = -(-N // tile["ROWS"]) - (-M // tile["ROWS"])
        launch(
            points_kernel,
            (B * blocks,),
            *(*inputs, extents, parts, self.left, self.right, self.exponents, self.halves, self.valid),
            *(N, M, D, width),
            **kind,
            **tile,
        )

    def sums(self, words: Tensor, D: int, all_queries: int = 0) -> Tensor:
        """Σ_j words[n, j] r_j of some queries, as products `[B, N, D]`."""
        N, M, all_queries = words.shape[1], self.right.shape[1], max(all_queries, self.left.shape[1])
        if all_queries < limits.LEAST_BY_COLUMNS[0] or M < limits.LEAST_BY_COLUMNS[1]:
            return exact_products(words, self.right, N, D, M, across=(False, True))
        return exact_products(words, self._columns, N, D, M)

    @cached_property
    def _columns(self) -> Tensor:
        """Words of the reference points by columns, `[B, width, M]` and zeros up to whole tiles."""
        (B, M, width), length = self.right.shape, padded(self.right.shape[1])
        columns = torch.empty((B, width, length), dtype=torch.int32, device=self.right.device)
        tiles = B * -(-length // limits.DEPTH) * -(-width // limits.DEPTH)
        launch(
            columns_kernel, (tiles,), self.right, columns, M, width, length, TILE=limits.DEPTH, num_warps=4, **OPTIONS
        )
        return columns
