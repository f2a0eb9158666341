"""Chains in Gram space, and by steps where there are too many reference points for that."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxkernels.triton_kernels.fixed_point.host import limits
from fluxkernels.triton_kernels.fixed_point.host.kde import kde
from fluxkernels.triton_kernels.fixed_point.host.products import exact_products, padded, row_shape, tile_shape
from fluxkernels.triton_kernels.fixed_point.langevin import (
    chain_extent_kernel,
    chain_kernel,
    chain_points_kernel,
    chain_repair_kernel,
    chain_results_kernel,
)
from fluxkernels.triton_kernels.launch import (
    OPTIONS,
    accumulator,
    launch,
    multiprocessors,
    on_device_of,
    random_arguments,
    strided,
    widened,
)
from fluxkernels.triton_kernels.steps import chain_by_steps, pass_by_steps


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
        device, width = x.device, padded(D)
        whole_pass = kind["PASS"]
        # The last step's noise is needed for the mean at its end only.
        self.noises = num_steps if whole_pass else num_steps - 1
        tile = tile_shape(max(N, M), width)
        parts = min(limits.EXTENTS, -(-max(N, M) // tile["ROWS"]))
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
    device, width = x.device, padded(M)
    kind = {"PASS": whole_pass, "SEEDED": noise is None, "WHOLE": D % 4 == 0, "ACC": accumulator(x.dtype)}
    points = _ChainPoints(chain, results[0], kind)
    products = exact_products(points.left, points.right, points.left.shape[1], M, points.left.shape[2])
    gram = torch.empty((B, M, width), dtype=torch.int32, device=device)
    combinations = torch.empty((B, 3 * N, width), dtype=torch.int32, device=device)
    heaviest = torch.empty((B, 2, N), dtype=torch.int32, device=device)
    sensitive = torch.empty((B, N), dtype=torch.int32, device=device)
    block = min(128, width)
    programs = B * -(-N // limits.CHAINS_OF_PROGRAM)
    num_warps = 8 if programs < multiprocessors(device) else 4
    launch(
        chain_kernel,
        (programs,),
        *(products, points.exponents, *strided(sigma2, tau), gram, combinations, heaviest, sensitive),
        *(N, M, D, num_steps, points.noises, width),
        PASS=whole_pass,
        **{"ROWS": limits.CHAINS_OF_PROGRAM, "BLOCK": block, "COLUMNS": block, "DEPTH": limits.DEPTH},
        **{"num_warps": num_warps, "num_stages": 2, **OPTIONS},
    )
    sums = exact_products(combinations, points.right, 3 * N if whole_pass else N, D, M, across=(False, True))
    vector = row_shape(D)
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
        **(row_shape(D, 256) | {"num_warps": 4}),  # tiles of 64 reference points
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
    groups = min(limits.MOST_PRODUCTS // (height * M), limits.MOST_WORDS // ((height + 10 * N) * D))
    if M > limits.MOST_REFS or groups == 0:
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
