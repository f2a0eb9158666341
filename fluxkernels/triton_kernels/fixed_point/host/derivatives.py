"""Derivatives of averages: coefficients of the reference points, and sums over queries."""

from typing import NamedTuple

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host.points import Points
from fluxkernels.triton_kernels.fixed_point.host.products import exact_products, row_shape
from fluxkernels.triton_kernels.fixed_point.host.weights import Block, Weights
from fluxkernels.triton_kernels.fixed_point.kde import (
    derivative_results_kernel,
    gathered_results_kernel,
    moments_kernel,
    words_kernel,
)
from fluxkernels.triton_kernels.launch import launch, strided


class Averaged(NamedTuple):
    """Values that are averaged, and log weights of the reference points."""

    values: Tensor
    log_weights: Tensor | None


class Moments:
    """Coefficients of the reference points in a derivative of a block of queries, and its products with them.

    Attributes:
        field: words of the field.
        words, scales, coefficients, sizes: as `moments_kernel` writes them.
    """

    def __init__(
        self,
        block: Block,
        weights: Weights,
        field: Tensor,
        out: Tensor,
        *,
        added: Tensor,
        g: Tensor | None = None,
        g_sigma2: Tensor | None = None,
        average: Averaged | None = None,
    ) -> None:
        points, _, x, refs, sigma2 = block
        (B, N, D), M = x.shape, refs.shape[1]
        device, width = x.device, weights.words.shape[2]
        averaged, log_weights = average or (refs, None)
        self.field = Points(field, averaged, centered=False)
        along = exact_products(self.field.left, self.field.right, N, M, self.field.left.shape[2])
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
            **row_shape(M),
        )
        sums = points.sums(self.words, D)
        launch(
            derivative_results_kernel,
            (B * N,),
            *(sums, points.exponents, self.coefficients, weights.totals, self.scales, weights.heaviest),
            *(*strided(x, added, refs, sigma2, source), out, N, M, D),
            RESIDUAL=residual,
            GIVEN=g is not None,
            **row_shape(D),
        )


def gather(
    out: Tensor,
    weights: Weights,
    values: Points,
    pull: tuple[Moments, Block] | None = None,
    *,
    only_pull: bool = False,
) -> None:
    """Add Σ_n w_nj values_n to `out` `[B, M, V]`, and with `pull` Σ_n c_nj (x_n - r_j) too, or that alone."""
    B, M, V = out.shape
    N, width = weights.words.shape[1:]
    sums = values.halves if only_pull else exact_products(weights.words, values.left, M, V, N, across=(True, True))
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
            **row_shape(M),
        )
        of_points = exact_products(words, points.left[:, block.rows], M, V, N, across=(True, True))
    launch(
        gathered_results_kernel,
        (B * M,),
        *(sums, values.exponents, weights.totals, values.valid, of_points, exponents, words, coefficients),
        *(weights.heaviest, exponents_x),
        *(*strided(x, refs, sigma2), out, N, M, V, width),
        VALUES=not only_pull,
        PULL=pull is not None,
        **row_shape(max(N, V), 256),
    )
