"""Softmax weights of reference points, for one block of queries at a time."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host import limits
from fluxkernels.triton_kernels.fixed_point.host.points import Points
from fluxkernels.triton_kernels.fixed_point.host.products import exact_products, padded, tile_shape
from fluxkernels.triton_kernels.fixed_point.kde import weights_kernel
from fluxkernels.triton_kernels.launch import launch, strided


class Block(NamedTuple):
    """Queries of some groups whose matrices of pairs are held at once.

    Attributes:
        points: words of all queries of the groups, and of their reference points.
        rows: which of these queries are in the block.
        x, refs, sigma2: the block itself.
    """

    points: Points
    rows: slice
    x: Tensor
    refs: Tensor
    sigma2: Tensor


class Weights:
    """Softmax weights of a block of queries, from exact products.

    Attributes:
        logits, words, scales, totals, heaviest, least: as `weights_kernel` writes them.
    """

    def __init__(
        self,
        block: Block,
        *,
        log_density: Tensor | None = None,
        transition: tuple[Tensor, Tensor] | None = None,
        words: bool = True,
        relative: bool = False,
    ) -> None:
        _, _, x, refs, sigma2 = block
        (B, N, D), M = x.shape, refs.shape[1]
        move, tau = transition or (refs, refs[:, 0, 0])
        inputs, sensitive = self._allocate(block)
        arguments = [
            *(*inputs, *strided(x, refs, move, sigma2, tau)),
            *(self.logits, self.words, self.scales, self.totals, self.heaviest, self.least),
            *(self.totals if log_density is None else log_density, sensitive, N, M, D, self.words.shape[2]),
        ]
        kind = {"MOVED": transition is not None, "KDE": log_density is not None, "WORDS": words, "RELATIVE": relative}
        launch_rows(weights_kernel, arguments, (B, N, M), **kind)

    def _allocate(self, block: Block) -> tuple[list[Tensor], Tensor]:
        """New results, and (the products of the block with what belongs to them, which queries are sensitive)."""
        points, rows, x, refs, _ = block
        (B, N, _), M = x.shape, refs.shape[1]
        device = x.device
        self.logits = torch.empty((B, N, M), dtype=torch.float32, device=device)
        self.words = torch.empty((B, N, padded(M)), dtype=torch.int32, device=device)
        self.totals = torch.empty((B, N), dtype=torch.float32, device=device)
        self.heaviest, sensitive = torch.empty((2, B, N), dtype=torch.int32, device=device)
        self.least, self.scales = torch.empty((2, B, N), dtype=torch.float64, device=device)
        products = exact_products(points.left[:, rows], points.right, N, M, points.left.shape[2])
        return [products, points.halves, points.exponents, points.valid[:, rows].contiguous()], sensitive


def launch_rows(kernel: Any, arguments: Sequence[Any], sizes: tuple[int, int, int], **kind: bool) -> None:
    """Launch a kernel of rows of pairs, and its repair of the rows that are sensitive."""
    B, N, M = sizes
    numbers = limits.LARGE_TILE if M >= limits.LARGE_TILE else limits.SMALL_TILE
    tile, single = tile_shape(N, M, numbers), tile_shape(1, M, limits.SMALL_TILE)
    for repair, shape, depth in ((False, tile, 64), (True, single, 32)):
        grid = (B * -(-N // shape["ROWS"]),)
        launch(kernel, grid, *arguments, REPAIR=repair, DEPTH=depth, **kind, **shape)


def blocks_of(
    x: Tensor, refs: Tensor, sigma2: Tensor, transition: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[tuple[slice, slice], Block]]:
    """Yield (groups and queries, block): several whole groups, or some queries of one.

    Callers drop what they made for a block before the next, so that matrices of two blocks never exist together.
    """
    (B, N, D), M = x.shape, refs.shape[1]
    groups = min(B, max(1, min(limits.MOST_PAIRS // (N * M), limits.MOST_WORDS // ((N + 2 * M) * D))))
    rows = N if groups > 1 else rows_of_blocks(N, max(1, min(limits.MOST_PAIRS // M, limits.MOST_WORDS // (8 * D))))
    for start in range(0, B, groups):
        group = slice(start, start + groups)
        moves = transition and (transition[0][group], transition[1][group])
        points = Points(x[group], refs[group], transition=moves)
        for row in range(0, N, rows):
            at = group, slice(row, row + rows)
            yield at, Block(points, at[1], x[at], refs[group], sigma2[group] if sigma2.ndim == 3 else sigma2[at])
        del points


def rows_of_blocks(rows: int, most: int) -> int:
    """Rows of equal blocks of at most `most` rows, filled up to whole tiles where those fit."""
    each = -(-rows // -(-rows // most))
    whole = (-(-each // tile.rows) * tile.rows for tile in limits.TILES[::-1])
    return next((full for full in whole if full <= most), each)
