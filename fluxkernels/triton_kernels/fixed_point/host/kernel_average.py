"""Averages of values under a kernel, and their derivatives."""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host.derivatives import Averaged, Moments, gather
from fluxkernels.triton_kernels.fixed_point.host.kde import kde_results
from fluxkernels.triton_kernels.fixed_point.host.points import Points
from fluxkernels.triton_kernels.fixed_point.host.products import row_shape
from fluxkernels.triton_kernels.fixed_point.host.weights import Block, Weights, blocks_of, launch_rows
from fluxkernels.triton_kernels.fixed_point.kernel_average import (
    kernel_average_results_kernel,
    kernel_average_weights_kernel,
)
from fluxkernels.triton_kernels.gram import host as gram
from fluxkernels.triton_kernels.launch import launch, on_device_of, strided, wide, widened


class _AverageWeights(Weights):
    """Weights of a block of queries under a kernel, relative to a reference point that need not be the heaviest.

    Attributes:
        variances: σ² of that reference point, or of the query, `[B, N]`.
    """

    def __init__(
        self,
        block: Block,
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
        launch_rows(kernel_average_weights_kernel, arguments, (B, N, M), **kind)


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
        for at, block in blocks_of(z, refs, sigma2):
            group, rows = at
            logs = None if log_weights is None else log_weights[group]
            first = rows.start if exclude_self else None
            weights = _AverageWeights(block, logs, log_sum[at], first=first, kernel=kernel)
            if values is None:
                kde_results(block._replace(sigma2=weights.variances), weights, shift[at], average[at])
            else:
                averaged = widened(values[group])[0]
                if rows.start == 0:
                    given = Points(averaged[:, :1], averaged, centered=False)
                assert given is not None
                _average_results(given, averaged, weights, average[at], N)
            del block, weights
    return shift, average, log_sum


def _average_results(
    points: Points, values: Tensor, weights: _AverageWeights, average: Tensor, all_queries: int
) -> None:
    """Write the average of the values for a block of queries."""
    B, N, V = average.shape
    sums = points.sums(weights.words, V, all_queries)
    launch(
        kernel_average_results_kernel,
        (B * N,),
        *(sums, points.exponents, weights.scales, weights.totals, weights.heaviest, *strided(values), average, N, V),
        **row_shape(V),
    )


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
        for at, block in blocks_of(z, refs, sigma2):
            group, first = at[0], at[1].start if exclude_self else None
            logs = None if log_weights is None else log_weights[group]
            log_sum = torch.empty_like(block.sigma2)
            weights = _AverageWeights(block, logs, log_sum, first=first, kernel=kernel, relative=False)
            none = log_sum == -torch.inf  # such a query adds nothing
            field, g = y[at].masked_fill(none.unsqueeze(-1), 0), g_log_sum[at].to(y.dtype).masked_fill(none, 0)
            averaged = Averaged(block.refs if values is None else widened(values[group])[0], logs)
            out = g_z[at]
            moments = Moments(block, weights, field, out, added=added[at], g=g, g_sigma2=g_sigma2[at], average=averaged)
            if values is not None:
                gather(g_values[group], weights, moments.field)
            gather(g_refs[group], weights, moments.field, (moments, block), only_pull=values is not None)
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
