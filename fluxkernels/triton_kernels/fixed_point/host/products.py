"""Launches of the exact product: its tiles, and how its sums are split."""

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host import limits
from fluxkernels.triton_kernels.fixed_point.host.limits import Tile
from fluxkernels.triton_kernels.fixed_point.products import products_kernel
from fluxkernels.triton_kernels.launch import OPTIONS, launch, multiprocessors, shared_memory


def padded(length: int) -> int:
    """Length of a row of words: whole tiles of the product."""
    return -(-length // limits.DEPTH) * limits.DEPTH


def row_shape(length: int, most: int = 1024) -> dict[str, int]:
    """Block and warps of a program that walks along `length` numbers."""
    block = max(32, min(most, 1 << (length - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 128)), **OPTIONS}


def tile_shape(rows: int, length: int, numbers: int = 1024) -> dict[str, int]:
    """Rows, block and warps of a program with a tile of `numbers` of `rows` points."""
    block = max(32, min(numbers, 1 << (length - 1).bit_length()))
    rows = min(numbers // block, 1 << (rows - 1).bit_length())
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, numbers // 256), **OPTIONS}


def most_splits(length: int) -> int:
    """Largest number of parts into which a sum of `length` terms is worth splitting."""
    return min(limits.MOST_SPLITS, -(-length // (4 * limits.DEPTH)))


def splits_of(tile: Tile, tiles: int, length: int, device: torch.device) -> tuple[int, int]:
    """(terms per part, parts): a split of a product's terms that gives work to the whole GPU.

    Programs that do not run at once are not more than two per multiprocessor: a third would take as long as all.
    """
    programs = 2 * multiprocessors(device)
    wanted = min(most_splits(length), programs // tiles if tile.resident == 1 else -(-programs // tiles))
    parts = max(wanted, -(-length // limits.LONGEST))
    span = -(-length // (parts * limits.DEPTH)) * limits.DEPTH
    return span, -(-length // span)


def fastest_tile(B: int, rows: int, columns: int, length: int, device: torch.device) -> Tile:
    """The fastest tile that fits and of which, with sums split, a GPU has enough."""

    def is_possible(tile: Tile) -> bool:
        tiles = B * -(-rows // tile.rows) * -(-columns // tile.columns) * most_splits(length)
        return tile.memory <= shared_memory(device) and tiles >= 2 * multiprocessors(device)

    possible = filter(is_possible, limits.TILES)
    return min(possible, key=lambda tile: tile.time * -(-rows // tile.rows) * tile.rows, default=limits.TILES[0])


def exact_products(
    left: Tensor, right: Tensor, rows: int, columns: int, length: int, *, across: tuple[bool, bool] = (False, False)
) -> Tensor:
    """Sums of products `[B, rows, columns]` over `length` terms; `across`: whether a row of left or right is a term."""
    B, device = left.shape[0], left.device
    products = torch.empty((B, rows, columns), dtype=torch.int64, device=device)
    side = [
        words.stride()[i]
        for words, a in ((left, across[0]), (right, across[1]))
        for i in ((0, 2, 1) if a else (0, 1, 2))
    ]
    tile = limits.TILES[0] if any(across) else fastest_tile(B, rows, columns, length, device)
    tiles = B * -(-rows // tile.rows) * -(-columns // tile.columns)
    span, splits = splits_of(tile, tiles, length, device)
    if splits > 1:
        products.zero_()
    launch(
        products_kernel,
        (tiles * splits,),
        *(left, *side[:3], right, *side[3:], products, rows, columns, length, span, splits),
        LEFT_ACROSS=across[0],
        RIGHT_ACROSS=across[1],
        SPLIT=splits > 1,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=limits.DEPTH,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )
    return products
