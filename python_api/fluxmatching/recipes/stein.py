"""Stein variational gradient descent and kernel Stein discrepancy, with a Gaussian kernel k = exp(-|x - y|²/2σ²)."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkernels import kernel_average
from fluxkernels.checks import check_points, check_positive, check_same_shape


def svgd_step(x: Tensor, score: Tensor, sigma: float, *, backend: str | None = None) -> Tensor:
    """Compute the direction in which particles move to a distribution (Liu and Wang 2016).

    φ(x_i) = 1/N Σ_j [k(x_j, x_i) s(x_j) + ∇_{x_j} k(x_j, x_i)], and the second term is k (x_i - x_j)/σ².

    Args:
        x: particles, `[..., N, D]`.
        score: s = ∇ log p at the particles, shape of x.
        sigma: bandwidth σ, in units of x.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N, D]`, in units of 1/x.
    """
    variance = check_positive("svgd_step", "sigma", sigma) ** 2
    dtype = _check("svgd_step", x, score).dtype
    # In float64: s and x/σ² are of very different sizes where particles are far apart in units of σ.
    x, score = x.double(), score.double()
    x = x - x.mean(-2, keepdim=True)
    mean, log_sum = kernel_average(x, x, variance, score - x / variance, backend=backend)
    return ((log_sum.exp() / x.shape[-2]).unsqueeze(-1) * (mean + x / variance)).to(dtype)


def kernel_stein_discrepancy(x: Tensor, score: Tensor, sigma: float, *, backend: str | None = None) -> Tensor:
    """Estimate the squared discrepancy of samples from a distribution, without bias (Liu, Lee and Jordan 2016).

    The mean over pairs i ≠ j of k [s_i·s_j + (s_i - s_j)·(x_i - x_j)/σ² + D/σ² - |x_i - x_j|²/σ⁴]. It is 0 in
    expectation for samples of the distribution that the score is of, and can be negative.

    Args:
        x: samples, `[..., N, D]`, N > 1.
        score: s = ∇ log p at the samples, shape of x.
        sigma: bandwidth σ, in units of x.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[...]`, in units of 1/x².
    """
    function = "kernel_stein_discrepancy"
    variance = check_positive(function, "sigma", sigma) ** 2
    dtype = _check(function, x, score).dtype
    N, D = x.shape[-2:]
    if N == 1:
        raise ValueError(f"{function}: x must have more than one sample")
    # In float64, as distances come from products of moments.
    x, score = x.double(), score.double()
    x = x - x.mean(-2, keepdim=True)
    squares, along = x.square().sum(-1, keepdim=True), (score * x).sum(-1, keepdim=True)
    # A term is a product of something of i and something of j, and averages of the latter are all that is needed.
    values = torch.cat([score, x, along, squares], -1)
    means, log_sum = kernel_average(x, x, variance, values, exclude_self=True, backend=backend)
    mean_score, mean_x, mean_along, mean_squares = means.split([D, D, 1, 1], -1)
    apart = (squares - 2 * (x * mean_x).sum(-1, keepdim=True) + mean_squares) / variance
    pull = along - (score * mean_x).sum(-1, keepdim=True) - (mean_score * x).sum(-1, keepdim=True) + mean_along
    terms = (score * mean_score).sum(-1, keepdim=True) + (pull + D - apart) / variance
    return ((log_sum.exp() * terms.squeeze(-1)).sum(-1) / (N * (N - 1))).to(dtype)


def _check(function: str, x: Tensor, score: Tensor) -> Tensor:
    """Return x if it is a tensor of points, and the score is of its shape."""
    check_points(function, "x", x)
    check_same_shape(function, "score", score, "x", x)
    return x
