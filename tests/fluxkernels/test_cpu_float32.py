"""Few dimensions in float32 on the cpu backend: errors against float64, and numbers that float32 cannot square."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fluxkernels as fk
from fluxkernels import cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the C++ kernels are not compiled")
F32, F64 = torch.float32, torch.float64

# Largest relative error. The mean of reference points much closer together than to the query has fewer digits of its
# own, and so has a log-density near 0 or the residual of a single query.
OPS: dict[str, tuple[Any, float]] = {
    "score": (lambda z, refs, field, sigma2: fk.kde_score(z, refs, sigma2, backend="cpu"), 1e-6),
    "mean": (lambda z, refs, field, sigma2: fk.kde_mean(z, refs, sigma2, backend="cpu"), 1e-5),
    "log density": (lambda z, refs, field, sigma2: fk.kde_log_density(z, refs, sigma2, backend="cpu"), 3e-6),
    "residual": (lambda z, refs, field, sigma2: fk.residual_gradient(z, field, refs, sigma2, backend="cpu"), 3e-6),
}


def problem(
    D: int, M: int, N: int, spread: float, offset: float, sigma: float, clusters: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (z, refs, field, sigma2); clusters: their size in units of the spread, or 0."""
    rng = np.random.default_rng(seed)
    refs = rng.standard_normal((M, D))
    if clusters:
        refs = refs[rng.integers(0, min(M, 4), M)] + clusters * rng.standard_normal((M, D))
    refs = offset + spread * refs
    z = refs[rng.integers(0, M, N)] + sigma * rng.standard_normal((N, D))
    arrays = z, refs, rng.standard_normal((N, D)), np.asarray(sigma**2)
    z, refs, field, sigma2 = (torch.from_numpy(a).to(F32) for a in arrays)
    return z, refs, field, sigma2


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    D=st.integers(1, 24),
    M=st.integers(2, 600),
    N=st.integers(4, 60),
    spread=st.floats(-2, 2),
    offset=st.sampled_from((0.0, 1.0, 1e4)),
    sigma=st.floats(-2, 2),
    clusters=st.sampled_from((0.0, 1e-3, 0.1)),
    seed=st.integers(0, 10**6),
)
def test_errors_against_float64(
    D: int, M: int, N: int, spread: float, offset: float, sigma: float, clusters: float, seed: int
) -> None:
    inputs = problem(D, M, N, 10**spread, offset, 10 ** (spread + sigma), clusters, seed)
    for name, (op, limit) in OPS.items():
        truth = op(*(t.double() for t in inputs))
        assert relative(op(*inputs), truth) < limit, name


@pytest.mark.parametrize("scale", [1e-18, 1e-13, 1e13, 1e18])
def test_numbers_that_float32_cannot_square_are_computed_in_float64(scale: float) -> None:
    z, refs, field, sigma2 = problem(3, 100, 20, 1.0, 0.0, 0.5, 0.0, 0)
    inputs = scale * z, scale * refs, field, scale**2 * sigma2
    for name, (op, limit) in OPS.items():
        truth = op(*(t.double() for t in inputs)).float()
        if name != "residual" or truth.isfinite().all():
            assert relative(op(*inputs), truth.double()) < limit, name


def test_a_cotangent_too_small_for_float32_products_keeps_its_digits() -> None:
    z, refs, _, sigma2 = problem(2, 50, 20, 1e-6, 0.0, 1e-6, 0.0, 0)
    gradients = []
    for dtype in (F32, F64):
        points = [t.to(dtype).requires_grad_() for t in (z, refs)]
        score = fk.kde_score(*points, sigma2.to(dtype), backend="cpu")
        gradients.append(torch.autograd.grad(score, points, torch.full_like(score, 1e-33)))
    for got, truth in zip(*gradients, strict=True):
        assert relative(got, truth) < 1e-6


@pytest.mark.parametrize("D", [1, 2, 5, 16])
def test_gradients(D: int) -> None:
    z, refs, _, sigma2 = problem(D, 300, 40, 1.0, 1e3, 0.3, 0.0, 0)
    gradients = []
    for dtype in (F32, F64):
        points = [t.to(dtype).requires_grad_() for t in (z, refs, sigma2)]
        value = fk.kde_score(*points, backend="cpu").square().sum() + fk.kde_log_density(*points, backend="cpu").sum()
        gradients.append(torch.autograd.grad(value, points))
    for got, truth in zip(*gradients, strict=True):
        assert relative(got, truth) < 2e-6


def test_a_far_query_among_near_ones() -> None:
    """Its weights hang on the digits of a distance of 1e8 σ²."""
    z, refs, field, sigma2 = problem(2, 3000, 30, 1.0, 0.0, 0.1, 0.0, 0)
    z[7] += 1000.0
    for name, (op, limit) in OPS.items():
        truth = op(*(t.double() for t in (z, refs, field, sigma2)))
        got = op(z, refs, field, sigma2)
        for n in (7, 8):
            assert relative(got[n], truth[n]) < 5 * limit, name


@pytest.mark.parametrize("D", [1, 2, 16])
def test_queries_between_two_reference_points(D: int) -> None:
    """Both have half of the weight, which hangs on the difference of two distances of hundreds of σ²."""
    _, refs, _, _ = problem(D, 200, 4, 1.0, 0.0, 1.0, 0.0, 0)
    nearest, neighbor = torch.cdist(refs.double(), refs.double()).fill_diagonal_(math.inf).min(1)
    z = (refs + refs[neighbor]) / 2
    sigma2 = (nearest / 60).square().float()
    got, truth = (fk.kde_score(z.to(t), refs.to(t), sigma2.to(t), backend="cpu").double() for t in (F32, F64))
    # The score is a small difference of displacements of that length.
    error = (got - truth).norm(dim=1) * sigma2 / nearest
    assert error.amax() < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_every_run(threads: int) -> None:
    z, refs, field, sigma2 = problem(2, 1500, 700, 1.0, 0.0, 0.2, 0.0, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        passes = [fk.flux_pass(z, refs, sigma2, 0.5, seed=1, backend="cpu") for _ in range(3)]
        averages = [each.transition_average(field) for each in passes]
    finally:
        torch.set_num_threads(before)
    for each, average in zip(passes[1:], averages[1:], strict=True):
        assert torch.equal(each.xt, passes[0].xt)
        assert torch.equal(average, averages[0])
