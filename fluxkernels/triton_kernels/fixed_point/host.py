"""Kernels for many dimensions of float32 points: fixed-point words, exact products on the matrix units.

Distances of queries from reference points come from inner products, which are exact in integers; sums of reference
points are exact products again. A chain runs in Gram space. Float64 arithmetic is per coordinate, never per pair, but
for rows whose weights need it. Queries are taken in blocks, so that matrices of pairs stay small.
"""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.implementation import KDE_RESULTS, wants_mean
from fluxkernels.triton_kernels.fixed_point.kde import (
    derivative_results_kernel,
    gathered_results_kernel,
    kde_results_kernel,
    moments_kernel,
    weights_kernel,
    words_kernel,
)
from fluxkernels.triton_kernels.fixed_point.kernel_average import (
    kernel_average_results_kernel,
    kernel_average_weights_kernel,
)
from fluxkernels.triton_kernels.fixed_point.langevin import (
    chain_extent_kernel,
    chain_kernel,
    chain_points_kernel,
    chain_repair_kernel,
    chain_results_kernel,
)
from fluxkernels.triton_kernels.fixed_point.points import columns_kernel, extent_kernel, points_kernel
from fluxkernels.triton_kernels.fixed_point.products import products_kernel
from fluxkernels.triton_kernels.gram import host as gram
from fluxkernels.triton_kernels.launch import (
    OPTIONS,
    accumulator,
    launch,
    multiprocessors,
    on_device_of,
    random_arguments,
    shared_memory,
    strided,
    wide,
    widened,
)
from fluxkernels.triton_kernels.steps import chain_by_steps, pass_by_steps

# Pairs whose matrices are held at once: 256 MiB of products, as much for weights, and 16 bytes more per pair for
# derivatives. With a quarter of it, many launches of few queries take 1.2 times as long.
MOST_PAIRS = 2**25
# Products of chains in Gram space that are held at once: 1 GiB.
MOST_PRODUCTS = 2**27
# Words of points of chains that are held at once: 2 GiB.
MOST_WORDS = 2**29
# Reference points up to which a chain runs in Gram space, where a step costs M² per query instead of M·D.
MOST_REFS = 1024
# Dimensions up to which sums of products of words fit in 64 bits.
MOST_DIMENSIONS = 2**16
CHAINS = 16  # chains that one program runs together
# (queries, reference points) from which sums over reference points are worth a copy of their words by columns.
LEAST_BY_COLUMNS = 128, 4096
DEPTH = 64  # terms of a tile at once
LONGEST = 2**15  # terms whose sums of products of digits fit in 32 bits
MOST_SPLITS = 8
EXTENTS = 512  # partial maxima per group
# Numbers of a program that walks along rows of pairs; the second with as many reference points.
FEW, MANY = 512, 4096


class Tile(NamedTuple):
    """A tile of the product, and how it is computed.

    Attributes:
        memory: bytes of shared memory.
        resident: programs that run on a multiprocessor of an H200 at once.
        time: relative time of the same work.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    memory: int
    resident: int
    time: float


# The larger tile loads fewer words and takes 0.72 times as long on an H200; but many tiles are needed to fill a GPU,
# and where terms are rows of the arrays it takes 1.3 times as long.
TILES = (Tile(32, 64, 4, 3, 49152, 4, 1.0), Tile(128, 64, 8, 4, 163840, 1, 0.72))


def _padded(length: int) -> int:
    """Length of a row of words: whole tiles of the product."""
    return -(-length // DEPTH) * DEPTH


def _vector(length: int, most: int = 1024) -> dict[str, int]:
    """Block and warps of a program that walks along `length` numbers."""
    block = max(32, min(most, 1 << (length - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 128)), **OPTIONS}


def _tile(rows: int, length: int, numbers: int = 1024) -> dict[str, int]:
    """Rows, block and warps of a program with a tile of `numbers` of `rows` points."""
    block = max(32, min(numbers, 1 << (length - 1).bit_length()))
    rows = min(numbers // block, 1 << (rows - 1).bit_length())
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, numbers // 256), **OPTIONS}


def _most_splits(length: int) -> int:
    """Largest number of parts into which a sum of `length` terms is worth splitting."""
    return min(MOST_SPLITS, -(-length // (4 * DEPTH)))


def _splits(tile: Tile, tiles: int, length: int, device: torch.device) -> tuple[int, int]:
    """(terms per part, parts): a split of a product's terms that gives work to the whole GPU.

    Programs that do not run at once are not more than two per multiprocessor: a third would take as long as all.
    """
    programs = 2 * multiprocessors(device)
    wanted = min(_most_splits(length), programs // tiles if tile.resident == 1 else -(-programs // tiles))
    parts = max(wanted, -(-length // LONGEST))
    span = -(-length // (parts * DEPTH)) * DEPTH
    return span, -(-length // span)


def _tile_for(B: int, rows: int, columns: int, length: int, device: torch.device) -> Tile:
    """The fastest tile that fits and of which, with sums split, a GPU has enough."""

    def is_possible(tile: Tile) -> bool:
        tiles = B * -(-rows // tile.rows) * -(-columns // tile.columns) * _most_splits(length)
        return tile.memory <= shared_memory(device) and tiles >= 2 * multiprocessors(device)

    possible = filter(is_possible, TILES)
    return min(possible, key=lambda tile: tile.time * -(-rows // tile.rows) * tile.rows, default=TILES[0])


def _rows_of_blocks(rows: int, most: int) -> int:
    """Rows of equal blocks of at most `most` rows, filled up to whole tiles where those fit."""
    each = -(-rows // -(-rows // most))
    whole = (-(-each // tile.rows) * tile.rows for tile in TILES[::-1])
    return next((full for full in whole if full <= most), each)


def _products(
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
    tile = TILES[0] if any(across) else _tile_for(B, rows, columns, length, device)
    tiles = B * -(-rows // tile.rows) * -(-columns // tile.columns)
    span, splits = _splits(tile, tiles, length, device)
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
        DEPTH=DEPTH,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )
    return products


class _Points:
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
        device, width = x.device, _padded(D)
        move, tau = transition or (refs, refs[:, 0, 0])
        inputs = strided(x, refs, move, tau)
        kind = {"CENTERED": centered, "MOVED": transition is not None}
        tile = _tile(max(N, M), width, MANY if M >= MANY else 1024)
        parts = min(EXTENTS, -(-max(N, M) // tile["ROWS"]))
        extents = torch.empty((B, 2, parts), dtype=torch.float32, device=device)
        launch(extent_kernel, (B * parts,), *inputs, extents, N, M, D, parts, **kind, **tile)
        self.left = torch.empty((B, N, width), dtype=torch.int32, device=device)
        self.right = torch.empty((B, M, width), dtype=torch.int32, device=device)
        self.exponents = torch.empty((B, 2), dtype=torch.int32, device=device)
        self.halves = torch.empty((B, M), dtype=torch.int64, device=device)
        self.valid = torch.empty((B, N), dtype=torch.float32, device=device)
        tile = _tile(max(N, M), width)
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
        if all_queries < LEAST_BY_COLUMNS[0] or M < LEAST_BY_COLUMNS[1]:
            return _products(words, self.right, N, D, M, across=(False, True))
        return _products(words, self._columns, N, D, M)

    @cached_property
    def _columns(self) -> Tensor:
        """Words of the reference points by columns, `[B, width, M]` and zeros up to whole tiles."""
        (B, M, width), length = self.right.shape, _padded(self.right.shape[1])
        columns = torch.empty((B, width, length), dtype=torch.int32, device=self.right.device)
        tiles = B * -(-length // DEPTH) * -(-width // DEPTH)
        launch(columns_kernel, (tiles,), self.right, columns, M, width, length, TILE=DEPTH, num_warps=4, **OPTIONS)
        return columns


class _Block(NamedTuple):
    """Queries of some groups whose matrices of pairs are held at once.

    Attributes:
        points: words of all queries of the groups, and of their reference points.
        rows: which of these queries are in the block.
        x, refs, sigma2: the block itself.
    """

    points: _Points
    rows: slice
    x: Tensor
    refs: Tensor
    sigma2: Tensor


class _Weights:
    """Softmax weights of a block of queries, from exact products.

    Attributes:
        logits, words, scales, totals, heaviest, least: as `weights_kernel` writes them.
    """

    def __init__(
        self,
        block: _Block,
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
        _launch_rows(weights_kernel, arguments, (B, N, M), **kind)

    def _allocate(self, block: _Block) -> tuple[list[Tensor], Tensor]:
        """New results, and (the products of the block with what belongs to them, which queries are sensitive)."""
        points, rows, x, refs, _ = block
        (B, N, _), M = x.shape, refs.shape[1]
        device = x.device
        self.logits = torch.empty((B, N, M), dtype=torch.float32, device=device)
        self.words = torch.empty((B, N, _padded(M)), dtype=torch.int32, device=device)
        self.totals = torch.empty((B, N), dtype=torch.float32, device=device)
        self.heaviest, sensitive = torch.empty((2, B, N), dtype=torch.int32, device=device)
        self.least, self.scales = torch.empty((2, B, N), dtype=torch.float64, device=device)
        products = _products(points.left[:, rows], points.right, N, M, points.left.shape[2])
        return [products, points.halves, points.exponents, points.valid[:, rows].contiguous()], sensitive


def _launch_rows(kernel: Any, arguments: Sequence[Any], sizes: tuple[int, int, int], **kind: bool) -> None:
    """Launch a kernel of rows of pairs, and its repair of the rows that are sensitive."""
    B, N, M = sizes
    tile, single = _tile(N, M, MANY if M >= MANY else FEW), _tile(1, M, FEW)
    for repair, shape, depth in ((False, tile, 64), (True, single, 32)):
        grid = (B * -(-N // shape["ROWS"]),)
        launch(kernel, grid, *arguments, REPAIR=repair, DEPTH=depth, **kind, **shape)


def _blocks(
    x: Tensor, refs: Tensor, sigma2: Tensor, transition: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[tuple[slice, slice], _Block]]:
    """Yield (groups and queries, block): several whole groups, or some queries of one.

    Callers drop what they made for a block before the next, so that matrices of two blocks never exist together.
    """
    (B, N, D), M = x.shape, refs.shape[1]
    groups = min(B, max(1, min(MOST_PAIRS // (N * M), MOST_WORDS // ((N + 2 * M) * D))))
    rows = N if groups > 1 else _rows_of_blocks(N, max(1, min(MOST_PAIRS // M, MOST_WORDS // (8 * D))))
    for start in range(0, B, groups):
        group = slice(start, start + groups)
        moves = transition and (transition[0][group], transition[1][group])
        points = _Points(x[group], refs[group], transition=moves)
        for row in range(0, N, rows):
            at = group, slice(row, row + rows)
            yield at, _Block(points, at[1], x[at], refs[group], sigma2[group] if sigma2.ndim == 3 else sigma2[at])
        del points


def kde(z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS) -> tuple[Tensor, Tensor, Tensor]:
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:2])
    z, refs = widened(z, refs)
    with on_device_of(z):
        for at, block in _blocks(z, refs, sigma2):
            weights = _Weights(block, log_density=log_density[at], relative=True)
            if wants_mean(results):
                _kde_results(block, weights, shift[at], mean[at])
            del block, weights
    return shift, mean, log_density


def _kde_results(block: _Block, weights: _Weights, shift: Tensor, mean: Tensor) -> None:
    """Write m - x and m of a block."""
    B, N, D = shift.shape
    sums = block.points.sums(weights.words, D)
    launch(
        kde_results_kernel,
        (B * N,),
        *(sums, block.points.exponents, weights.logits, weights.scales, weights.totals, weights.heaviest),
        *(*strided(block.x, block.refs, block.sigma2), shift, mean, N, block.refs.shape[1], D),
        **_vector(D),
    )


class _AverageWeights(_Weights):
    """Weights of a block of queries under a kernel, relative to a reference point that need not be the heaviest.

    Attributes:
        variances: σ² of that reference point, or of the query, `[B, N]`.
    """

    def __init__(
        self,
        block: _Block,
        log_weights: Tensor | None,
        log_sum: Tensor,
        *,
        first: int | None,
        kernel: str,
        relative: bool = True,
    ) -> None:
        """Compute them; log-sums go to `log_sum`.

        Args:
            first: number of the first query in its group, whose own reference point each leaves out, or None.
            relative: whether words are coefficients relative to that reference point, and the total of a query that
                has no reference point is NaN.
        """
        _, _, x, refs, sigma2 = block
        (B, N, D), M = x.shape, refs.shape[1]
        inputs, sensitive = self._allocate(block)
        self.variances = torch.empty_like(self.least)
        per_ref, laplace = sigma2.ndim == 3, kernel == "laplace"
        of_refs = _scales_of_refs(sigma2, laplace) if per_ref else self.totals
        arguments = [
            *(*inputs, *strided(x, refs), *gram.variance_strides(sigma2), of_refs),
            *((refs, 0, 0) if log_weights is None else strided(log_weights)),  # a placeholder that is never read
            *(self.logits, self.words, self.scales, self.totals, self.heaviest),
            *(
                self.least,
                self.variances,
                log_sum,
                sensitive,
                torch.nan if relative else 1.0,
                N,
                M,
                D,
                self.words.shape[2],
                first or 0,
            ),
        ]
        kind = {"LOGS": log_weights is not None, "EXCLUDE": first is not None, "LAPLACE": laplace, "PER_REF": per_ref}
        kind |= {"RELATIVE": relative}
        _launch_rows(kernel_average_weights_kernel, arguments, (B, N, M), **kind)


def _scales_of_refs(sigma2: Tensor, laplace: bool) -> Tensor:
    """1/2σ², or 1/σ, of reference points as sums of two float32, `[B, 2, M]`."""
    variance = sigma2[:, 0].double()
    scale = variance.rsqrt() if laplace else 0.5 / variance
    high = scale.float()
    return torch.stack([high, (scale - high).float()], 1)


def kernel_average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), V = z.shape, refs.shape[2] if values is None else values.shape[2]
    shift = z.new_empty((B, N, D if values is None else 0))
    log_sum = z.new_empty((B, N), dtype=wide(z.dtype))
    average = z.new_empty((B, N, V))
    z, refs = widened(z, refs)
    given = None
    with on_device_of(z):
        for at, block in _blocks(z, refs, sigma2):
            group, rows = at
            logs = None if log_weights is None else log_weights[group]
            first = rows.start if exclude_self else None
            weights = _AverageWeights(block, logs, log_sum[at], first=first, kernel=kernel)
            if values is None:
                _kde_results(block._replace(sigma2=weights.variances), weights, shift[at], average[at])
            else:
                averaged = widened(values[group])[0]
                if rows.start == 0:
                    given = _Points(averaged[:, :1], averaged, centered=False)
                assert given is not None
                _average_results(given, averaged, weights, average[at], N)
            del block, weights
    return shift, average, log_sum


def _average_results(
    points: _Points, values: Tensor, weights: _AverageWeights, average: Tensor, all_queries: int
) -> None:
    """Write the average of the values for a block of queries."""
    B, N, V = average.shape
    sums = points.sums(weights.words, V, all_queries)
    launch(
        kernel_average_results_kernel,
        (B * N,),
        *(sums, points.exponents, weights.scales, weights.totals, weights.heaviest, *strided(values), average, N, V),
        **_vector(V),
    )


class _Averaged(NamedTuple):
    """Values that are averaged, and log weights of the reference points."""

    values: Tensor
    log_weights: Tensor | None


class _Moments:
    """Coefficients of the reference points in a derivative of a block of queries, and its products with them.

    Attributes:
        field: words of the field.
        words, scales, coefficients, sizes: as `moments_kernel` writes them.
    """

    def __init__(
        self,
        block: _Block,
        weights: _Weights,
        field: Tensor,
        out: Tensor,
        *,
        added: Tensor,
        g: Tensor | None = None,
        g_sigma2: Tensor | None = None,
        average: _Averaged | None = None,
    ) -> None:
        points, _, x, refs, sigma2 = block
        (B, N, D), M = x.shape, refs.shape[1]
        device, width = x.device, weights.words.shape[2]
        averaged, log_weights = average or (refs, None)
        self.field = _Points(field, averaged, centered=False)
        along = _products(self.field.left, self.field.right, N, M, self.field.left.shape[2])
        self.words = torch.empty((B, N, width), dtype=torch.int32, device=device)
        self.scales = torch.empty((B, N), dtype=torch.float64, device=device)
        self.coefficients = torch.empty((B, N, M), dtype=torch.float32, device=device)
        self.sizes = torch.empty((B, N), dtype=torch.float32, device=device)
        residual = g_sigma2 is None
        source = sigma2 if g is None else g  # a placeholder that is never read
        launch(
            moments_kernel,
            (B * N,),
            *(weights.logits, weights.totals, weights.heaviest, weights.least, along),
            *(points.exponents, self.field.exponents, self.field.valid, *strided(field, averaged, sigma2, source)),
            *(self.words, self.scales, self.coefficients, self.sizes),
            self.sizes if g_sigma2 is None else g_sigma2,
            *((refs, 0, 0) if log_weights is None else strided(log_weights)),  # a placeholder that is never read
            *(N, M, field.shape[2], width, 0 if average else D),
            RESIDUAL=residual,
            GIVEN=g is not None,
            LOGS=log_weights is not None,
            **_vector(M),
        )
        sums = points.sums(self.words, D)
        launch(
            derivative_results_kernel,
            (B * N,),
            *(sums, points.exponents, self.coefficients, weights.totals, self.scales, weights.heaviest),
            *(*strided(x, added, refs, sigma2, source), out, N, M, D),
            RESIDUAL=residual,
            GIVEN=g is not None,
            **_vector(D),
        )


def _gather(
    out: Tensor,
    weights: _Weights,
    values: _Points,
    pull: tuple[_Moments, _Block] | None = None,
    *,
    only_pull: bool = False,
) -> None:
    """Add Σ_n w_nj values_n to `out` `[B, M, V]`, and with `pull` Σ_n c_nj (x_n - r_j) too, or that alone."""
    B, M, V = out.shape
    N, width = weights.words.shape[1:]
    sums = values.halves if only_pull else _products(weights.words, values.left, M, V, N, across=(True, True))
    # Without `pull`, placeholders that are never read.
    of_points, words, coefficients, exponents, exponents_x = (
        sums,
        weights.words,
        sums,
        values.exponents,
        values.exponents,
    )
    x = refs = out
    sigma2 = weights.totals
    if pull is not None:
        moments, block = pull
        points, _, x, refs, sigma2 = block
        words, coefficients, exponents_x = moments.words, moments.coefficients, points.exponents
        exponents = torch.empty(B, dtype=torch.int32, device=out.device)
        launch(
            words_kernel,
            (B * N,),
            coefficients,
            moments.sizes,
            weights.heaviest,
            words,
            exponents,
            M,
            N,
            width,
            **_vector(M),
        )
        of_points = _products(words, points.left[:, block.rows], M, V, N, across=(True, True))
    launch(
        gathered_results_kernel,
        (B * M,),
        *(sums, values.exponents, weights.totals, values.valid, of_points, exponents, words, coefficients),
        *(weights.heaviest, exponents_x),
        *(*strided(x, refs, sigma2), out, N, M, V, width),
        VALUES=not only_pull,
        PULL=pull is not None,
        **_vector(max(N, V), 256),
    )


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g_z, g_sigma2 = z.new_empty(z.shape), sigma2.new_empty(sigma2.shape)
    g_refs = torch.zeros(refs.shape, dtype=torch.float64, device=z.device)
    refs_dtype = refs.dtype
    z, refs, g_shift, g_mean, g_log_density = widened(z, refs, g_shift, g_mean, g_log_density)
    g_moved = g_mean + g_shift
    with on_device_of(z):
        for at, block in _blocks(z, refs, sigma2):
            weights = _Weights(block)
            g, of_variance = g_log_density[at], g_sigma2[at]
            moments = _Moments(block, weights, g_moved[at], g_z[at], added=g_shift[at], g=g, g_sigma2=of_variance)
            _gather(g_refs[at[0]], weights, moments.field, (moments, block))
            del block, weights, moments
    return g_z, g_refs.to(refs_dtype), g_sigma2


def kernel_average_backward(
    g_shift: Tensor,
    g_average: Tensor,
    g_log_sum: Tensor,
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if kernel == "laplace" or sigma2.ndim == 3:
        # There a coefficient is not one number of a query times the cotangent of a logit.
        return gram.kernel_average_backward(
            g_shift, g_average, g_log_sum, z, refs, sigma2, values, log_weights, exclude_self, kernel
        )
    g_z, g_sigma2 = z.new_empty(z.shape), sigma2.new_empty(sigma2.shape)
    g_refs, g_logs = (torch.zeros_like(t, dtype=torch.float64) for t in (refs, refs[..., 0]))
    g_values = g_refs if values is None else torch.zeros_like(values, dtype=torch.float64)
    refs_dtype = refs.dtype
    (y,) = widened(g_average if values is not None else g_average + g_shift)
    added = g_shift if values is None else z.new_zeros(()).expand(z.shape)
    z, refs = widened(z, refs)
    with on_device_of(z):
        for at, block in _blocks(z, refs, sigma2):
            group, first = at[0], at[1].start if exclude_self else None
            logs = None if log_weights is None else log_weights[group]
            log_sum = torch.empty_like(block.sigma2)
            weights = _AverageWeights(block, logs, log_sum, first=first, kernel=kernel, relative=False)
            none = log_sum == -torch.inf  # such a query adds nothing
            field, g = y[at].masked_fill(none.unsqueeze(-1), 0), g_log_sum[at].to(y.dtype).masked_fill(none, 0)
            averaged = _Averaged(block.refs if values is None else widened(values[group])[0], logs)
            out = g_z[at]
            moments = _Moments(
                block, weights, field, out, added=added[at], g=g, g_sigma2=g_sigma2[at], average=averaged
            )
            if values is not None:
                _gather(g_values[group], weights, moments.field)
            _gather(g_refs[group], weights, moments.field, (moments, block), only_pull=values is not None)
            if logs is not None:
                g_logs[group] += (moments.coefficients * block.sigma2.unsqueeze(-1)).sum(1, dtype=torch.float64)
            del block, weights, moments
    return (
        g_z,
        g_refs.to(refs_dtype),
        g_sigma2,
        refs.new_empty(0) if values is None else g_values.to(values.dtype),
        refs.new_empty(0) if log_weights is None else g_logs.to(log_weights.dtype),
    )


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    gradient = z.new_empty(z.shape)
    z, field, refs = widened(z, field, refs)
    with on_device_of(z):
        for at, block in _blocks(z, refs, sigma2):
            given = None if factor is None else factor[at]
            _Moments(block, _Weights(block, words=False), field[at], gradient[at], added=field[at], g=given)
            del block
    return gradient


class _Chain(NamedTuple):
    """Arguments of `langevin_chain` for some groups."""

    x: Tensor
    refs: Tensor
    sigma2: Tensor
    tau: Tensor
    num_steps: int
    noise: Tensor | None
    seed: Tensor | None
    first_group: int


class _ChainPoints:
    """Words of the points and noise of chains, and what the chains end with if there are no reference points.

    Attributes:
        left, right: words of [x0; noise; R] and of R.
        noises: number of steps whose noise is in `left`.
        blocks: blocks of a row, each with an entry in `valid`.
        exponents, valid, drifts: as `chain_points_kernel` writes them.
    """

    def __init__(self, chain: _Chain, x0_out: Tensor, kind: dict[str, Any]) -> None:
        x, refs, sigma2, tau, num_steps, noise, seed, first_group = chain
        (B, N, D), M = x.shape, refs.shape[1]
        device, width = x.device, _padded(D)
        whole_pass = kind["PASS"]
        # The last step's noise is needed for the mean at its end only.
        self.noises = num_steps if whole_pass else num_steps - 1
        tile = _tile(max(N, M), width)
        parts = min(EXTENTS, -(-max(N, M) // tile["ROWS"]))
        self.blocks = -(-width // tile["BLOCK"])
        tiles = self.blocks * (-(-N // tile["ROWS"]) - (-M // tile["ROWS"]))
        extents = torch.empty((B, 4, parts), dtype=torch.float32, device=device)
        launch(
            chain_extent_kernel,
            (B * parts,),
            *(
                *strided(x, refs),
                *random_arguments(x, noise, seed)[1:],
                extents,
                N,
                M,
                D,
                num_steps + whole_pass,
                parts,
            ),
            SEEDED=noise is None,
            **tile,
        )
        self.left = torch.empty((B, (1 + self.noises) * N + M, width), dtype=torch.int32, device=device)
        self.right = torch.empty((B, M, width), dtype=torch.int32, device=device)
        self.exponents = torch.empty((B, 2), dtype=torch.int32, device=device)
        self.valid = torch.empty((B, N, self.blocks), dtype=torch.float32, device=device)
        self.drifts = torch.empty((B, N, D), dtype=torch.float64, device=device)
        launch(
            chain_points_kernel,
            (B * tiles,),
            *(*strided(x, refs, sigma2, tau), *random_arguments(x, noise, seed), extents, parts),
            *(self.left, self.right, self.exponents, self.valid, x0_out, self.drifts),
            *(N, M, D, width, num_steps, self.noises, first_group),
            **kind,
            **tile,
        )


def _chain_in_gram_space(chain: _Chain, results: Sequence[Tensor], whole_pass: bool) -> None:
    """Write (x0, m(x0) - x0, x_τ, m(x_τ) - x_τ); without `whole_pass` only x_τ, and the others are placeholders."""
    x, refs, sigma2, tau, num_steps, noise, seed, first_group = chain
    (B, N, D), M = x.shape, refs.shape[1]
    device, width = x.device, _padded(M)
    kind = {"PASS": whole_pass, "SEEDED": noise is None, "WHOLE": D % 4 == 0, "ACC": accumulator(x.dtype)}
    points = _ChainPoints(chain, results[0], kind)
    products = _products(points.left, points.right, points.left.shape[1], M, points.left.shape[2])
    gram = torch.empty((B, M, width), dtype=torch.int32, device=device)
    combinations = torch.empty((B, 3 * N, width), dtype=torch.int32, device=device)
    heaviest = torch.empty((B, 2, N), dtype=torch.int32, device=device)
    sensitive = torch.empty((B, N), dtype=torch.int32, device=device)
    block = min(128, width)
    programs = B * -(-N // CHAINS)
    num_warps = 8 if programs < multiprocessors(device) else 4
    launch(
        chain_kernel,
        (programs,),
        *(products, points.exponents, *strided(sigma2, tau), gram, combinations, heaviest, sensitive),
        *(N, M, D, num_steps, points.noises, width),
        PASS=whole_pass,
        **{"ROWS": CHAINS, "BLOCK": block, "COLUMNS": block, "DEPTH": DEPTH},
        **{"num_warps": num_warps, "num_stages": 2, **OPTIONS},
    )
    sums = _products(combinations, points.right, 3 * N if whole_pass else N, D, M, across=(False, True))
    vector = _vector(D)
    launch(
        chain_results_kernel,
        (B * N * -(-D // vector["BLOCK"]),),
        *(sums, points.exponents, points.drifts, points.valid, heaviest, *strided(refs), *results, N, D),
        points.blocks,
        PASS=whole_pass,
        **vector,
    )
    memory = torch.empty((B, N, D), dtype=torch.float64, device=device)
    launch(
        chain_repair_kernel,
        (B * N,),
        *(*strided(x, refs, sigma2, tau), *random_arguments(x, noise, seed), sensitive),
        *(memory, products.view(torch.float64), products.stride(0), *results, N, M, D, num_steps, first_group),
        **kind,
        **(_vector(D, 256) | {"num_warps": 4}),  # tiles of 64 reference points
    )


def _in_gram_space(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    whole_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ), or None where one group has too many products or words to hold."""
    (B, N, D), M = x.shape, refs.shape[1]
    height = (1 + num_steps) * N + M
    # Words of the points, and three sums, a drift and memory for repair per query.
    groups = min(MOST_PRODUCTS // (height * M), MOST_WORDS // ((height + 10 * N) * D))
    if M > MOST_REFS or groups == 0:
        return None
    xt = x.new_empty(x.shape)
    x0, shift0, shift_t = (x.new_empty(x.shape) for _ in range(3)) if whole_pass else (xt, xt, xt)
    x, refs = widened(x, refs)
    noise = None if noise is None else widened(noise)[0]
    for start in range(0, B, groups):
        group = slice(start, start + groups)
        of_group = None if noise is None else noise[:, group]
        chain = _Chain(x[group], refs[group], sigma2[group], tau[group], num_steps, of_group, seed, start)
        _chain_in_gram_space(chain, [result[group] for result in (x0, shift0, xt, shift_t)], whole_pass)
    return x0, shift0, xt, shift_t


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    with on_device_of(x0):
        found = _in_gram_space(x0, refs, sigma2, tau, num_steps, noise, seed, False)
        return found[2] if found else chain_by_steps(kde, x0, refs, sigma2, tau, num_steps, noise, seed)[1]


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(x):
        found = _in_gram_space(x, refs, sigma2, tau, num_steps, noise, seed, True)
        return found or pass_by_steps(kde, x, refs, sigma2, tau, num_steps, noise, seed)


def _transition(
    x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor, words: bool
) -> Iterator[tuple[slice, slice, _Weights]]:
    """Yield (groups, ends j, weights of the starts) block by block: the ends are queries, the means refs."""
    variance = sigma2.unsqueeze(-1).expand(xt.shape[:2])
    x0, shift0, xt = widened(x0, shift0, xt)
    for (group, ends), block in _blocks(xt, x0, variance, (shift0, tau)):
        yield group, ends, _Weights(block, transition=(shift0[group], tau[group]), words=words)


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    with on_device_of(x0):
        for group, ends, found in _transition(x0, shift0, xt, sigma2, tau, False):
            weights[group, :, ends] = (found.logits.exp2_() / found.totals.unsqueeze(-1)).mT
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    average = torch.zeros((*x0.shape[:2], values.shape[-1]), dtype=torch.float64, device=x0.device)
    with on_device_of(x0):
        for group, ends, found in _transition(x0, shift0, xt, sigma2, tau, True):
            (of_ends,) = widened(values[group, ends])
            _gather(average[group], found, _Points(of_ends, of_ends, centered=False))
    return average.to(values.dtype)
