"""Evaluation of a formula block by block, so that no whole `[B, N, M]` matrix is ever materialized."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Pairs (query, reference point) per block: at eight bytes each, a few such matrices fit into a second-level cache.
PAIRS_IN_BLOCK = 1 << 16
# Up to this dimension distances are sums of squared differences; above, they come from a matrix product.
DIRECT_DIMENSIONS = 16
# Queries per block, at least, where there is a matrix product: with few rows it is slow.
ROWS_OF_PRODUCT = 64


def compute_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def upcast(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to the dtype that the formulas compute in."""
    return [t.to(compute_dtype(t.device)) for t in tensors]


def center(z: Tensor, refs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z - o, refs - o, o) upcast, with o the mean of refs `[B, 1, D]`: a common translation changes no result."""
    z, refs = upcast(z, refs)
    origin = refs.detach().mean(-2, keepdim=True)
    return z - origin, refs - origin, origin


def blocks(z: Tensor, refs: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Cut queries `[B, N, D]` and refs `[B, M, D]` into blocks of about `PAIRS_IN_BLOCK` pairs.

    Each item is (groups, slices of rows): many whole groups at once, or one group in slices of rows.
    """
    (B, N, D), M = z.shape, refs.shape[1]
    if N * M <= PAIRS_IN_BLOCK:
        step = max(1, PAIRS_IN_BLOCK // (N * M))
        for start in range(0, B, step):
            yield slice(start, start + step), [slice(None)]
    else:
        step = max(1 if D <= DIRECT_DIMENSIONS else ROWS_OF_PRODUCT, PAIRS_IN_BLOCK // M)
        for group in range(B):
            yield slice(group, group + 1), [slice(start, start + step) for start in range(0, N, step)]


def map_blocks(
    formula: Callable[..., tuple[Tensor, ...]], queries: Sequence[Tensor], refs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Apply `formula(*queries, *refs)` block by block and concatenate its results.

    Args:
        formula: takes the tensors of one block, returns tensors of shape `[b, n, ...]`.
        queries: tensors `[B, N, ...]`, cut along groups and queries; the first is `[B, N, D]`.
        refs: tensors `[B, ...]`, cut along groups only; the first is `[B, M, D]`.
    """
    groups = []
    for group, rows in blocks(queries[0], refs[0]):
        per_group = [r[group] for r in refs]
        parts = [formula(*(q[group, row] for q in queries), *per_group) for row in rows]
        groups.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    return tuple(torch.cat(part) for part in zip(*groups, strict=True))
