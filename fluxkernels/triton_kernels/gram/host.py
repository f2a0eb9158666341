"""Kernels for many dimensions of float64 points.

Inner products with the reference points run on the matrix units, give the weights, and sums of reference points run on
the matrix units again. A chain runs in Gram space. Queries are taken in blocks, so that matrices of pairs stay small.
"""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.implementation import KDE_RESULTS, wants_mean
from fluxkernels.triton_kernels.gram.kde import moments_kernel, weights_kernel
from fluxkernels.triton_kernels.gram.kernel_average import kernel_average_moments_kernel, kernel_average_weights_kernel
from fluxkernels.triton_kernels.gram.langevin import chain_kernel, rebuild_kernel, stack_kernel
from fluxkernels.triton_kernels.gram.products import combine_kernel, gather_kernel, products_kernel
from fluxkernels.triton_kernels.launch import (
    OPTIONS,
    accumulator,
    launch,
    multiprocessors,
    on_device_of,
    random_arguments,
    strided,
    triton_type,
    wide,
    widened,
)
from fluxkernels.triton_kernels.steps import chain_by_steps, pass_by_steps

# Pairs in a matrix: 64 MiB in float64.
MOST_PAIRS = 2**23
# Products up to which a chain runs in Gram space, which holds them all at once: 256 MiB.
MOST_PRODUCTS = 2**25
# Reference points up to which a chain runs in Gram space, where a step costs M² per query instead of M·D.
MOST_REFS = 1024
CHAINS = 16  # chains that one program runs together
DEPTH = 16  # numbers that a product sums between two loads
# Options of kernels whose program has one row of a matrix of pairs.
ROW = {"BLOCK": 1024, "num_warps": 4, **OPTIONS}


def _tile(count: int, most: int = 64) -> int:
    """Side of a tile for `count` rows or columns; the matrix units need at least 16."""
    return max(16, min(most, 1 << (count - 1).bit_length()))


def _tiles(rows: int, columns: int) -> tuple[dict[str, int], int]:
    """(tile sizes as keyword arguments, number of tiles that cover the rows and columns)."""
    # With 64 rows, Triton 3.6 compiles products for sm_100 to instructions that have no float64.
    sizes = _sizes(_tile(rows, 32), _tile(columns))
    return sizes, -(-rows // sizes["ROWS"]) * -(-columns // sizes["COLUMNS"])


def _sizes(rows: int, columns: int) -> dict[str, int]:
    warps = 8 if rows * columns >= 1024 else 4  # a float64 needs two registers
    return {"ROWS": rows, "COLUMNS": columns, "DEPTH": DEPTH, "num_warps": warps, **OPTIONS}


def _chain_tiles(M: int) -> dict[str, int]:
    return _sizes(CHAINS, _tile(M, 128))


def _rebuild_tiles(N: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    most = 16 if dtype == torch.float64 else 32  # three sums at once, and the noise
    return _sizes(_tile(N, most), _tile(D, 2 * most))


def _split(D: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(dimensions per part, parts): a split of the dimensions that gives work to the whole GPU."""
    parts = min(-(-D // (4 * DEPTH)), -(-2 * multiprocessors(device) // programs))
    span = -(-D // (parts * DEPTH)) * DEPTH
    return span, -(-D // span)


def _blocks(B: int, N: int, M: int) -> Iterator[tuple[slice, slice]]:
    """Cut into groups and queries whose matrices of pairs are held at once."""
    groups = max(1, MOST_PAIRS // (min(N, 64) * M))
    rows = max(1, MOST_PAIRS // (min(groups, B) * M))
    for group in range(0, B, groups):
        for row in range(0, N, rows):
            yield slice(group, group + groups), slice(row, row + rows)


def _products(x: Tensor, refs: Tensor, centered: bool, transition: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Inner products `[B, splits, N + 1, M + 1]` of queries and refs; `transition` (shift0, τ) makes refs its means."""
    (B, N, D), M = x.shape, refs.shape[1]
    sizes, tiles = _tiles(N, M)
    span, splits = _split(D, B * tiles, x.device)
    products = torch.empty((B, splits, N + 1, M + 1), dtype=torch.float64, device=x.device)
    move, tau = transition or (refs, refs[:, 0, 0])
    launch(
        products_kernel,
        (B * splits * tiles,),
        *strided(x, refs, move, tau),
        *(products, N, M, D, span, splits),
        CENTERED=centered,
        MOVED=transition is not None,
        **sizes,
    )
    return products


def _weights(
    x: Tensor, refs: Tensor, sigma2: Tensor, transition: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, squared distances, both `[B, N, M]` in float64, log-density `[B, N]`)."""
    (B, N, D), M = x.shape, refs.shape[1]
    products = _products(x, refs, True, transition)
    weights = torch.empty((B, N, M), dtype=torch.float64, device=x.device)
    distances, log_density = torch.empty_like(weights), x.new_empty((B, N))
    move, tau = transition or (refs, refs[:, 0, 0])
    launch(
        weights_kernel,
        (B * N,),
        *(products, products.shape[1]),
        *strided(x, refs, move, sigma2, tau),
        *(weights, distances, log_density, N, M, D),
        MOVED=transition is not None,
        KDE=transition is None,
        DEPTH=64,
        **ROW,
    )
    return weights, distances, log_density


def _combine(
    coefficients: Tensor, x: Tensor, refs: Tensor, of: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(Σ_j w_j r_j - x, Σ_j w_j r_j), or with `of` = (p, f, field) Σ_j c_j r_j + p x + f field, twice."""
    (B, N, D), M = x.shape, refs.shape[1]
    out = x.new_empty(x.shape)
    mean = x.new_empty(x.shape) if of is None else out
    of_point, of_field, field = of or (coefficients, coefficients, x)
    sizes, tiles = _tiles(N, D)
    launch(
        combine_kernel,
        (B * tiles,),
        *(coefficients, of_point, of_field),
        *strided(x, field, refs),
        *(out, mean, N, M, D),
        KDE=of is None,
        **sizes,
    )
    return out, mean


def _gather(weights: Tensor, values: Tensor, out: Tensor, pull: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """Add Σ_n w_nj values_n to `out` `[B, M, V]`, and with `pull` = (c, x, refs) also Σ_n c_nj (x_n - r_j)."""
    B, N, M = weights.shape
    V = values.shape[-1]
    coefficients, x, refs = pull or (weights, values, values)
    sizes, tiles = _tiles(M, V)
    launch(
        gather_kernel,
        (B * tiles,),
        *(weights, values, *values.stride(), coefficients, x, *x.stride(), refs, *refs.stride(), out, N, M, V),
        BOTH=pull is not None,
        **sizes,
    )


def kde(z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), M = z.shape, refs.shape[1]
    shift, mean, log_density = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty((B, N))
    z, refs = widened(z, refs)
    with on_device_of(z):
        for group, rows in _blocks(B, N, M):
            block = z[group, rows]
            weights, _, log_density[group, rows] = _weights(block, refs[group], sigma2[group, rows])
            if wants_mean(results):
                shift[group, rows], mean[group, rows] = _combine(weights, block, refs[group])
    return shift, mean, log_density


def _moments(
    weights: Tensor,
    distances: Tensor,
    field: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    g: Tensor | None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coefficients of refs `[B, N, M]`, of the query and of the field, and the cotangent of σ², `[B, N]`).

    g is the cotangent of the log-density, or the factor of the residual, None for 1.
    """
    (B, N, D), M = field.shape, refs.shape[1]
    along = _products(field, refs, False)
    of_point, of_field, g_sigma2 = torch.empty((3, B, N), dtype=torch.float64, device=field.device)
    coefficients = torch.empty_like(weights)
    source = sigma2 if g is None else g  # a placeholder that is never read
    launch(
        moments_kernel,
        (B * N,),
        *(weights, distances, along, along.shape[1], sigma2, *sigma2.stride(), source, *source.stride()),
        *(coefficients, of_point, of_field, g_sigma2, N, M, D),
        RESIDUAL=residual,
        GIVEN=g is not None,
        **ROW,
    )
    return coefficients, of_point, of_field, g_sigma2


def kde_backward(
    g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), M = z.shape, refs.shape[1]
    g_z, g_sigma2 = z.new_empty(z.shape), sigma2.new_empty(sigma2.shape)
    g_refs = torch.zeros(refs.shape, dtype=torch.float64, device=z.device)
    g_mean = g_mean.double() + g_shift
    refs_dtype = refs.dtype
    z, refs, g_shift, g_log_density = widened(z, refs, g_shift, g_log_density)
    with on_device_of(z):
        for group, rows in _blocks(B, N, M):
            at, of_group = (group, rows), refs[group]
            weights, distances, _ = _weights(z[at], of_group, sigma2[at])
            coefficients, of_point, of_field, g_sigma2[at] = _moments(
                weights, distances, g_mean[at], of_group, sigma2[at], g_log_density[at]
            )
            g_z[at], _ = _combine(coefficients, z[at], of_group, (of_point, of_field, g_shift[at]))
            _gather(weights, g_mean[at], g_refs[group], (coefficients, z[at], of_group))
    return g_z, g_refs.to(refs_dtype), g_sigma2


def residual_gradient(z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None) -> Tensor:
    (B, N, _), M = z.shape, refs.shape[1]
    gradient = z.new_empty(z.shape)
    z, field, refs = widened(z, field, refs)
    with on_device_of(z):
        for group, rows in _blocks(B, N, M):
            at, of_group = (group, rows), refs[group]
            weights, distances, _ = _weights(z[at], of_group, sigma2[at])
            given = None if factor is None else factor[at]
            coefficients, of_point, of_field, _ = _moments(
                weights, distances, field[at], of_group, sigma2[at], given, residual=True
            )
            gradient[at], _ = _combine(coefficients, z[at], of_group, (of_point, of_field, field[at]))
    return gradient


def _noises(num_steps: int, whole_pass: bool) -> int:
    """Number of steps whose noise needs products; the last step needs them only for the mean at its end."""
    return num_steps if whole_pass else num_steps - 1


def _gram_space_pays(x: Tensor, refs: Tensor, num_steps: int, whole_pass: bool) -> bool:
    (B, N, _), M = x.shape, refs.shape[1]
    return M <= MOST_REFS and B * ((1 + _noises(num_steps, whole_pass)) * N + M) * M <= MOST_PRODUCTS


def _chain_in_gram_space(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    tau: Tensor,
    num_steps: int,
    noise: Tensor | None,
    seed: Tensor | None,
    whole_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ); without `whole_pass` only x_τ is computed."""
    (B, N, D), M = x.shape, refs.shape[1]
    noises = _noises(num_steps, whole_pass)
    xt = x.new_empty(x.shape)
    x0, shift0, shift_t = (x.new_empty(x.shape) for _ in range(3)) if whole_pass else (xt, xt, xt)
    x, refs = widened(x, refs)
    noise = None if noise is None else widened(noise)[0]
    random = random_arguments(x, noise, seed)
    inputs = strided(x, refs, sigma2)
    kind: dict[str, Any] = {
        "PASS": whole_pass, "SEEDED": noise is None, "WHOLE": D % 4 == 0, "ACC": accumulator(x.dtype)
    }  # fmt: skip
    sizes, _ = _tiles(N, M)
    tiles = ((1 + noises) * -(-N // sizes["ROWS"]) + -(-M // sizes["ROWS"])) * -(-M // sizes["COLUMNS"])
    span, splits = _split(D, B * tiles, x.device)
    parts = torch.empty((B, splits, (1 + noises) * N + M, M), dtype=torch.float64, device=x.device)
    launch(
        stack_kernel,
        (B * splits * tiles,),
        *(*inputs, *random, parts, N, M, D, noises, span, splits),
        DTYPE=triton_type(xt.dtype),
        **kind,
        **sizes,
    )
    products = parts.sum(1) if splits > 1 else parts
    weights, coefficients, first_weights = torch.empty((3, B, N, M), dtype=torch.float64, device=x.device)
    launch(
        chain_kernel,
        (B * -(-N // CHAINS),),
        *(products, sigma2, *sigma2.stride(), tau, *tau.stride(), weights, coefficients, first_weights),
        *(N, M, num_steps, noises),
        PASS=whole_pass,
        **_chain_tiles(M),
    )
    sizes = _rebuild_tiles(N, D, x.dtype)
    launch(
        rebuild_kernel,
        (B * -(-N // sizes["ROWS"]) * -(-D // sizes["COLUMNS"]),),
        *(*inputs, tau, *tau.stride(), *random, weights, coefficients, first_weights),
        *(x0, shift0, xt, shift_t, N, M, D, num_steps),
        **kind,
        **sizes,
    )
    return x0, shift0, xt, shift_t


def langevin_chain(
    x0: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> Tensor:
    with on_device_of(x0):
        if _gram_space_pays(x0, refs, num_steps, False):
            return _chain_in_gram_space(x0, refs, sigma2, tau, num_steps, noise, seed, False)[2]
        return chain_by_steps(kde, x0, refs, sigma2, tau, num_steps, noise, seed)[1]


def flux_pass(
    x: Tensor, refs: Tensor, sigma2: Tensor, tau: Tensor, num_steps: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(x):
        if _gram_space_pays(x, refs, num_steps, True):
            return _chain_in_gram_space(x, refs, sigma2, tau, num_steps, noise, seed, True)
        return pass_by_steps(kde, x, refs, sigma2, tau, num_steps, noise, seed)


def _transition(
    x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (groups, ends j, weights `[groups, ends, N]`) block by block: the ends are queries, the means refs."""
    (B, E, _), N = xt.shape, x0.shape[1]
    variance = sigma2.unsqueeze(-1).expand(B, E)
    x0, shift0, xt = widened(x0, shift0, xt)
    for group, ends in _blocks(B, E, N):
        moves = shift0[group], tau[group]
        yield group, ends, _weights(xt[group, ends], x0[group], variance[group, ends], moves)[0]


def transition_weights(x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    weights = x0.new_empty((*x0.shape[:2], xt.shape[1]))
    with on_device_of(x0):
        for group, ends, of_ends in _transition(x0, shift0, xt, sigma2, tau):
            weights[group, :, ends] = of_ends.mT
    return weights


def transition_average(x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
    average = torch.zeros((*x0.shape[:2], values.shape[-1]), dtype=torch.float64, device=x0.device)
    with on_device_of(x0):
        for group, ends, weights in _transition(x0, shift0, xt, sigma2, tau):
            (of_ends,) = widened(values[group, ends])
            _gather(weights, of_ends, average[group])
    return average.to(values.dtype)


def _average_weights(
    x: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    log_weights: Tensor | None,
    log_sum: Tensor,
    first: int | None,
    kernel: str,
    of_none: float,
) -> tuple[Tensor, Tensor]:
    """(weights, squared distances), both `[B, N, M]` in float64; log-sums go to `log_sum`.

    Args:
        first: number of the first query in its group, whose own reference point each leaves out, or None.
        of_none: weight of all reference points of a query that has none.
    """
    (B, N, D), M = x.shape, refs.shape[1]
    products = _products(x, refs, True)
    weights, distances = torch.empty((2, B, N, M), dtype=torch.float64, device=x.device)
    launch(
        kernel_average_weights_kernel,
        (B * N,),
        *(products, products.shape[1], *strided(x, refs), *variance_strides(sigma2)),
        *((refs, 0, 0) if log_weights is None else strided(log_weights)),  # a placeholder that is never read
        *(weights, distances, log_sum, of_none, N, M, D, first or 0),
        LOGS=log_weights is not None,
        EXCLUDE=first is not None,
        LAPLACE=kernel == "laplace",
        DEPTH=64,
        **ROW,
    )
    return weights, distances


def variance_strides(sigma2: Tensor) -> list[Any]:
    """σ² `[B, N]` or `[B, 1, M]` with its strides of groups, queries and reference points."""
    per_query, per_ref = (0, sigma2.stride(2)) if sigma2.ndim == 3 else (sigma2.stride(1), 0)
    return [sigma2, sigma2.stride(0), per_query, per_ref]


def _of_block(sigma2: Tensor, group: slice, rows: slice) -> Tensor:
    return sigma2[group] if sigma2.ndim == 3 else sigma2[group, rows]


def kernel_average(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    values: Tensor | None,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), M = z.shape, refs.shape[1]
    shift = z.new_empty((B, N, D if values is None else 0))
    log_sum = z.new_empty((B, N), dtype=wide(z.dtype))
    average = z.new_empty((B, N, D if values is None else values.shape[2]))
    z, refs = widened(z, refs)
    with on_device_of(z):
        for group, rows in _blocks(B, N, M):
            x, of_group = z[group, rows], refs[group]
            given = _of_block(sigma2, group, rows), None if log_weights is None else log_weights[group]
            first = (rows.start if exclude_self else None), kernel
            sums = log_sum.new_empty(x.shape[:2])
            weights, _ = _average_weights(x, of_group, *given, sums, *first, torch.nan)
            log_sum[group, rows] = sums
            if values is None:
                shift[group, rows], average[group, rows] = _combine(weights, x, of_group)
            else:
                average[group, rows] = weights @ values[group].double()
    return shift, average, log_sum


class _AverageMoments(NamedTuple):
    """Coefficients of derivatives of averages for a block of queries.

    Attributes:
        cotangents: of the logits, `[B, N, M]`.
        coefficients: of the reference points in the cotangent of z, `[B, N, M]`.
        of_point: of the query there, `[B, N]`.
        of_variance: cotangent of σ², `[B, N]`, or `[B, 1, M]` where each reference point has its own.
    """

    cotangents: Tensor
    coefficients: Tensor
    of_point: Tensor
    of_variance: Tensor

    @classmethod
    def of(
        cls,
        weights: Tensor,
        distances: Tensor,
        along: Tensor,
        sigma2: Tensor,
        log_sum: Tensor,
        g_log_sum: Tensor,
        kernel: str,
    ) -> "_AverageMoments":
        """Compute them; `along` is overwritten."""
        (B, N, M), per_ref = weights.shape, sigma2.ndim == 3
        cotangents, coefficients = torch.empty((2, B, N, M), dtype=torch.float64, device=weights.device)
        of_point, slopes = torch.empty((2, B, N), dtype=torch.float64, device=weights.device)
        launch(
            kernel_average_moments_kernel,
            (B * N,),
            *(weights, distances, along, *variance_strides(sigma2), log_sum, *strided(g_log_sum)),
            *(cotangents, coefficients, of_point, slopes, N, M),
            LAPLACE=kernel == "laplace",
            PER_REF=per_ref,
            **ROW,
        )
        return cls(cotangents, coefficients, of_point, along.sum(1, keepdim=True) if per_ref else slopes)


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
    (B, N, _), M = z.shape, refs.shape[1]
    pulls = refs.new_zeros((B, M), dtype=torch.float64)  # sums of the coefficients over queries
    g_z, g_refs, g_sigma2, g_logs = (torch.zeros_like(t, dtype=torch.float64) for t in (z, refs, sigma2, pulls))
    g_values = g_refs if values is None else torch.zeros_like(values, dtype=torch.float64)
    y = g_average.double() if values is not None else g_average.double() + g_shift
    dtypes = z.dtype, refs.dtype
    z, refs = widened(z, refs)
    averaged = refs if values is None else values
    with on_device_of(z):
        for group, rows in _blocks(B, N, M):
            at, of_group = (group, rows), refs[group]
            if rows.start == 0:
                origin, given = of_group[:, :1].double(), averaged[group].double()
                first_value = given[:, :1]
                relative = (given - first_value).mT
            variance, logs = _of_block(sigma2, group, rows), None if log_weights is None else log_weights[group]
            first = rows.start if exclude_self else None
            log_sum = pulls.new_empty(z[at].shape[:2])
            weights, distances = _average_weights(z[at], of_group, variance, logs, log_sum, first, kernel, 0.0)
            # A query that has no reference point adds nothing.
            present = torch.where((log_sum == -torch.inf).unsqueeze(-1), 0, y[at])
            moments = _AverageMoments.of(
                weights, distances, present @ relative, variance, log_sum, g_log_sum[at], kernel
            )
            of_field = torch.full_like(moments.of_point, -1.0 if values is None else 0.0)
            field = g_shift[at] if values is None else z[at]
            g_z[at], _ = _combine(moments.coefficients, z[at], of_group, (moments.of_point, of_field, field))
            _gather(weights, present, g_values[group])
            g_refs[group] += moments.coefficients.mT @ (z[at].double() - origin)
            pulls[group] += moments.coefficients.sum(1)
            g_logs[group] += moments.cotangents.sum(1)
            g_sigma2[group if sigma2.ndim == 3 else at] += moments.of_variance
    g_refs -= pulls.unsqueeze(-1) * (refs.double() - refs[:, :1])
    return (
        g_z.to(dtypes[0]),
        g_refs.to(dtypes[1]),
        g_sigma2.to(sigma2.dtype),
        refs.new_empty(0) if values is None else g_values.to(values.dtype),
        refs.new_empty(0) if log_weights is None else g_logs.to(log_weights.dtype),
    )
