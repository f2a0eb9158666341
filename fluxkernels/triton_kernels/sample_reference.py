"""Reference points drawn with the weights of a kernel, for every dimension and dtype.

Logits are in float64 from differences, so that all backends draw the same points: correct but not optimized.
"""

# Names inside a kernel have Triton's types, which mypy does not know; kernels take many arguments.
# mypy: ignore-errors
# ruff: noqa: PLR0913
import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxkernels.triton_kernels.launch import launch, on_device_of, strided
from fluxkernels.triton_kernels.philox import block_of

REFERENCE = tl.constexpr(12)  # stream, as in fluxkernels.philox
TILE = 32  # queries and reference points of a tile


@triton.jit
def sample_reference_kernel(
    z, z_b, z_n, z_d, refs, r_b, r_m, r_d, sigma2, s_b, s_n, s_m, logs, l_b, l_m, seed, index,
    N, M, D,
    LOGS: tl.constexpr, EXCLUDE: tl.constexpr, LAPLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """argmax_j (logit_nj - log E_nj), E exponential numbers of the elements `[B, N, M]`."""
    UNIT: tl.constexpr = 2.3283064365386963e-10  # 2⁻³²
    blocks = tl.cdiv(N, ROWS)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    key_of_seed = tl.load(seed)
    best = tl.full([ROWS], float("-inf"), tl.float64)
    found = tl.zeros([ROWS], tl.int64)
    for start in range(0, M, COLUMNS):
        j = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (n < N)[:, None] & (j < M)[None, :]
        square = tl.zeros([ROWS, COLUMNS], tl.float64)
        for d in range(D):
            x = tl.load(z + b * z_b + n * z_n + d * z_d, mask=n < N, other=0.0).to(tl.float64)
            r = tl.load(refs + b * r_b + j * r_m + d * r_d, mask=j < M, other=0.0).to(tl.float64)
            difference = x[:, None] - r[None, :]
            square += difference * difference
        at = n[:, None] * s_n + j[None, :] * s_m
        variance = tl.load(sigma2 + b * s_b + at, mask=inside, other=1.0).to(tl.float64)
        logit = -tl.sqrt(square / variance) if LAPLACE else -square / (2 * variance)
        if LOGS:
            logit += tl.load(logs + b * l_b + j * l_m, mask=j < M, other=0.0).to(tl.float64)[None, :]
        if EXCLUDE:
            logit = tl.where(n[:, None] == j[None, :], float("-inf"), logit)
        element = ((b * N + n) * M)[:, None] + j[None, :]
        w0, w1, w2, w3 = block_of(key_of_seed, REFERENCE, 0, element >> 2)
        place = element & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        number = -tl.log((word.to(tl.float64) + 0.5) * UNIT)
        key = tl.where(inside, logit - tl.log(number), float("-inf"))
        highest = tl.max(key, 1)
        better = highest > best
        found = tl.where(better, start + tl.argmax(key, 1).to(tl.int64), found)
        best = tl.where(better, highest, best)
    tl.store(index + b * N + n, found, mask=n < N)


def sample_reference(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    seed: Tensor,
) -> Tensor:
    (B, N, D), M = z.shape, refs.shape[1]
    index = torch.empty((B, N), dtype=torch.int64, device=z.device)
    of_group, *others = sigma2.stride()
    of_query, of_reference = (0, others[1]) if sigma2.ndim == 3 else (others[0], 0)
    # Without log-weights, a placeholder that is never read.
    logs = sigma2.flatten(1) if log_weights is None else log_weights
    with on_device_of(z):
        launch(
            sample_reference_kernel,
            (B * -(-N // TILE),),
            *(*strided(z, refs), sigma2, of_group, of_query, of_reference, *strided(logs), seed, index, N, M, D),
            LOGS=log_weights is not None,
            EXCLUDE=exclude_self,
            LAPLACE=kernel == "laplace",
            ROWS=TILE,
            COLUMNS=TILE,
        )
    return index
