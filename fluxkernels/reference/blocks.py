"""Evaluation of a formula block by block, so that no `[B, N, M]` matrix is ever held whole."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Pairs (query, centre) a block may hold: at eight bytes each, a few such matrices stay in a second-level cache.
PAIRS_IN_BLOCK = 1 << 16
# A matrix product over few rows is slow: with many coordinates a block has at least this many queries.
ROWS_OF_PRODUCT = 64


def compute_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on the devices that lack it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def upcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that the formulas compute in."""
    return [t.to(compute_dtype(t.device)) for t in tensors]


def centre(z: Tensor, refs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z - o, refs - o, o) upcast, with o the mean of refs `[B, 1, D]`: a common translation changes no result."""
    z, refs = upcast(z, refs)
    origin = refs.detach().mean(-2, keepdim=True)
    return z - origin, refs - origin, origin


def blocks(groups: int, queries: int, centres: int, least_rows: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut `[groups, queries]` into blocks of about `PAIRS_IN_BLOCK` pairs: whole groups, or rows of one group."""
    if queries * centres <= PAIRS_IN_BLOCK:
        step = max(1, PAIRS_IN_BLOCK // (queries * centres))
        for start in range(0, groups, step):
            yield slice(start, start + step), slice(None)
    else:
        step = max(least_rows, PAIRS_IN_BLOCK // centres)
        for group in range(groups):
            for start in range(0, queries, step):
                yield slice(group, group + 1), slice(start, start + step)


def pair_blocks(z: Tensor, refs: Tensor) -> Iterator[tuple[slice, slice]]:
    """The blocks for queries `[B, N, D]` against centres `[B, M, D]`."""
    least_rows = 1 if z.shape[2] <= 16 else ROWS_OF_PRODUCT
    return blocks(z.shape[0], z.shape[1], refs.shape[1], least_rows)


def map_blocks(
    formula: Callable[..., tuple[Tensor, ...]], queries: Sequence[Tensor], centres: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Apply `formula(*queries, *centres)` block by block and put its results together.

    Args:
        formula: takes the tensors of one block, returns tensors of shape `[b, n, ...]`.
        queries: tensors `[B, N, ...]`, cut along groups and queries; the first is `[B, N, D]`.
        centres: tensors `[B, ...]`, cut along groups only; the first is `[B, M, D]`.
    """
    results: list[Tensor] = []
    for group, rows in pair_blocks(queries[0], centres[0]):
        parts = formula(*(q[group, rows] for q in queries), *(c[group] for c in centres))
        if not results:
            results = [part.new_empty((*queries[0].shape[:2], *part.shape[2:])) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[group, rows] = part
    return tuple(results)
