"""The functions that every backend must have. `fluxkernels.reference` implements them in plain PyTorch.

Shapes are flat: queries `[B, N, D]`, reference points `[B, M, D]`, B groups. Tensors may have any strides.
"""

# A registered op takes tensors and constants one by one.
# ruff: noqa: PLR0913
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

KDE_RESULTS = ("shift", "mean", "log_density")


def wants_mean(results: Sequence[str]) -> bool:
    """Return True if one of these results of `kde` needs the weighted mean of the reference points."""
    return "shift" in results or "mean" in results


class Kernels(Protocol):
    """Functions of points. The first argument of each is `[B, N, D]`; results have the dtype of the arguments."""

    def kde(
        self, z: Tensor, refs: Tensor, sigma2: Tensor, results: Sequence[str] = KDE_RESULTS
    ) -> tuple[Any, Any, Any]:
        """(m(z) - z, m(z), log p̂(z)) for sigma2 `[B, N]`; `results` are those that are used."""

    def kde_backward(
        self, g_shift: Tensor, g_mean: Tensor, g_log_density: Tensor, z: Tensor, refs: Tensor, sigma2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of z, refs and sigma2 from those of the results of `kde`."""

    def kernel_average(
        self,
        z: Tensor,
        refs: Tensor,
        sigma2: Tensor,
        values: Tensor | None,
        log_weights: Tensor | None,
        exclude_self: bool,
        kernel: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(Σ_j w_j r_j - z, Σ_j w_j v_j, log Σ_j exp(logit_j)) for sigma2 `[B, N]` or `[B, 1, M]`.

        Values `[B, M, V]`, None for the reference points; with values the first result is `[B, N, 0]`. log_weights
        `[B, M]`, None for zeros. The log-sums are in float32 or wider. A kernel is "gaussian", exp(-|z - r|²/2σ²), or
        "laplace", exp(-|z - r|/σ).
        """

    def kernel_average_backward(
        self,
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
        """Cotangents of z, refs, sigma2, values and log_weights; those of None are empty."""

    def sample_reference(
        self,
        z: Tensor,
        refs: Tensor,
        sigma2: Tensor,
        log_weights: Tensor | None,
        exclude_self: bool,
        kernel: str,
        seed: Tensor,
    ) -> Tensor:
        """Index of a reference point per query `[B, N]`, int64, drawn with the weights of `kernel_average`.

        It is argmax_j (logit_nj - log E_nj), E = -log u from word e of the stream, e = (b·N + n)·M + j.
        """

    def langevin_chain(
        self,
        x0: Tensor,
        refs: Tensor,
        sigma2: Tensor,
        tau: Tensor,
        num_steps: int,
        noise: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        """x_τ `[B, N, D]` for sigma2 and tau `[B]`, and noise `[num_steps, B, N, D]` or a seed `[]`."""

    def flux_pass(
        self,
        x: Tensor,
        refs: Tensor,
        sigma2: Tensor,
        tau: Tensor,
        num_steps: int,
        noise: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, m(x0) - x0, x_τ, m(x_τ) - x_τ) for noise `[1 + num_steps, B, N, D]` or a seed `[]`."""

    def residual_gradient(
        self, z: Tensor, field: Tensor, refs: Tensor, sigma2: Tensor, factor: Tensor | None = None
    ) -> Tensor:
        """J_s f - c ∇(Δp̂/p̂) `[B, N, D]` for a field `[B, N, D]`, sigma2 and factors c `[B, N]`, None for 1."""

    def transition_weights(self, x0: Tensor, shift0: Tensor, xt: Tensor, sigma2: Tensor, tau: Tensor) -> Tensor:
        """w `[B, N, N']` for shift0 = m(x0) - x0, ends `[B, N', D]`, sigma2 and tau `[B]`."""

    def transition_average(
        self, x0: Tensor, shift0: Tensor, xt: Tensor, values: Tensor, sigma2: Tensor, tau: Tensor
    ) -> Tensor:
        """Σ_j w_ij values_j `[B, N, V]` for values `[B, N', V]`."""


class Implementation(Kernels, Protocol):
    """A backend: its kernels and its random numbers."""

    def normal(self, seed: Tensor, shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers, those of `fluxkernels.philox.normal`."""
