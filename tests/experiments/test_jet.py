"""Derivatives in closed form against autograd: the algebra, the templates, and the controllable fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.common.jet import Jet, Univariate, linear, log_gaussian, log_sigmoid, log_sigmoid_below
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.controllable.fields import FAMILIES, Controls, Family, SkewTemplate, TriangleTemplate
from fluxmatching import FluxOptions, flux_target
from fluxmatching.losses.second_derivatives import endpoint_gradient

F64 = torch.float64
SIGMA = math.sqrt(0.625)  # of a component of the mixture
# Each control alone, then all together.
THETAS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [2.5, -2.5, 2.5]]


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient `[D, K, n]`, Hessian `[D, D, K, n]` and ∇Δ `[D, K, n]` of functions `[D, n] -> [K, n]`."""
    x = x.clone().requires_grad_()
    results = []
    for value in function(x):
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g.sum(), x, create_graph=True)[0] for g in gradient])
        laplacian = sum(hessian[d, d].sum() for d in range(len(x)))
        results.append((gradient, hessian, torch.autograd.grad(laplacian, x, retain_graph=True)[0]))
    return tuple(torch.stack(parts, -2).detach() for parts in zip(*results, strict=True))  # type: ignore[return-value]


def assert_equals_autograd(function: Callable[[Tensor], Jet], x: Tensor) -> None:
    jet = function(x)
    expected = by_autograd(lambda points: function(points).value, x)
    for got, want in zip((jet.gradient, jet.hessian, jet.laplacian_gradient), expected, strict=True):
        torch.testing.assert_close(got.expand(want.shape), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(jet.laplacian.expand(jet.value.shape), expected[1].diagonal().sum(-1))


def waves(x: Tensor, function: Univariate) -> Jet:
    """Functions of five coordinates along vectors of different lengths."""
    directions = torch.randn(len(x), 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    return Jet.along(directions, directions.T @ x - 0.3, function)


def cube(t: Tensor) -> tuple[Tensor | float, ...]:
    return t**3, 3 * t**2, 6 * t, 6.0


FUNCTIONS = [log_sigmoid, log_sigmoid_below, log_gaussian(0.7), cube]


@pytest.mark.parametrize("D", [1, 2, 3])
@pytest.mark.parametrize("function", FUNCTIONS, ids=["log_sigmoid", "log_sigmoid_below", "log_gaussian", "cube"])
def test_algebra(D: int, function: Univariate) -> None:
    x = torch.randn(D, 7, dtype=F64)
    assert_equals_autograd(lambda x: waves(x, function), x)
    assert_equals_autograd(lambda x: waves(x, function) + waves(x, cube), x)
    assert_equals_autograd(lambda x: Jet.cat(waves(x, function), waves(x, cube).times(0.2)).log_sum(), x)
    assert_equals_autograd(lambda x: waves(x, log_sigmoid).through(function), x)
    assert_equals_autograd(lambda x: waves(x, linear).log_sum().through(function), x)


def test_log_sigmoids_hold_far_out() -> None:
    t = torch.tensor([-2000.0, 2000.0], dtype=F64)
    expected = torch.tensor([[-2000.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(torch.stack(log_sigmoid(t)), expected)
    expected[0], expected[1] = expected[0].flip(0), -expected[1].flip(0)
    torch.testing.assert_close(torch.stack(log_sigmoid_below(t)), expected)


def test_higher_derivatives_are_computed_at_their_first_use_only() -> None:
    def fail() -> tuple[Tensor, Tensor]:
        raise AssertionError

    jet = Jet(torch.zeros(2, 3), torch.zeros(2, 2, 3), fail)
    sums = Jet.cat(jet + jet, jet.times(2.0)).through(linear).log_sum()
    torch.testing.assert_close(sums.value.exp(), torch.full((1, 3), 6.0))
    with pytest.raises(AssertionError):
        _ = sums.hessian


def make_controls() -> Controls:
    mixture = GaussianMixture(triangle_means(2.3), 0.625)
    controls = Controls(mixture, TriangleTemplate(mixture.means), SkewTemplate())
    controls.normalize(mixture.sample(1200, torch.Generator().manual_seed(0)))
    return controls


def special_points() -> Tensor:
    """Points everywhere, close to vertices and edges, and far out, `[n, 2]`, with n no multiple of the block size."""
    generator = torch.Generator().manual_seed(4)
    vertices = triangle_means(2.3)
    share = torch.linspace(0, 1, 41, dtype=F64).unsqueeze(-1)
    edges = torch.cat([a + share * (b - a) for a, b in zip(vertices, vertices.roll(-1, 0), strict=True)])
    edges = torch.cat([edges + s * torch.randn(edges.shape, dtype=F64, generator=generator) for s in (1e-3, 0.1)])
    angle = torch.linspace(0, 6.2, 31, dtype=F64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    scattered = 2.5 * torch.randn(1500, 2, dtype=F64, generator=generator)
    return torch.cat([scattered, edges, *(r * circle for r in (0.01, 5.0, 12.0, 30.0))])


@pytest.mark.parametrize("name", ["triangle", "skew", "mixture"])
def test_templates(name: str) -> None:
    assert_equals_autograd(getattr(make_controls(), name).log_jet, special_points()[:500].T)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("theta", THETAS, ids=["rot", "tri", "skew", "all"])
@pytest.mark.parametrize("foreign", [False, True])
def test_bracket_of_a_field_equals_autograd(family: Family, theta: list[float], foreign: bool) -> None:
    """Score of the field, or vectors that are no score."""
    controls, z = make_controls(), special_points()
    field = controls.field(torch.tensor(theta, dtype=F64), family)
    score = torch.randn_like(z) if foreign else controls.mixture.score(z)
    exact = {"score": score, "probe": None}
    expected, f = endpoint_gradient(field, z, **exact, method="double_backward")
    got, value = endpoint_gradient(field, z, **exact, method="closed_form")
    assert expected.isfinite().all()
    error = torch.linalg.vector_norm(got - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    assert error.max() < 1e-10
    torch.testing.assert_close(value, f, rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_field_is_the_score_and_its_controls(family: Family) -> None:
    controls, z = make_controls(), special_points().unflatten(0, (2, -1))
    theta = torch.tensor(THETAS[-1], dtype=F64)
    expected = controls.mixture.score(z) + (theta.unsqueeze(-1) * controls.basis(z, family)).sum(-2)
    torch.testing.assert_close(controls.field(theta, family)(z), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_target_equals_autograd(family: Family, backend: str) -> None:
    controls = make_controls()
    field = controls.field(torch.tensor(THETAS[-1], dtype=F64), family)
    x = controls.mixture.sample_means((12, 5))
    refs = controls.mixture.means.unsqueeze(1)
    exact = FluxOptions(grouped=True, divergence="exact", backend=backend)
    expected, whole, chunked = (
        flux_target(
            field, x, SIGMA, replace(exact, second_derivatives=method, chunk_size=size), refs=refs, seed=2
        ).target
        for method, size in (("double_backward", None), ("closed_form", None), ("closed_form", 5))
    )
    scale = expected.abs().max() if family == "violating" else 1.0
    assert (whole - expected).abs().max() < 1e-10 * scale
    assert torch.equal(whole, chunked)


def test_a_probe_is_refused() -> None:
    field = make_controls().field(torch.ones(3, dtype=F64), "violating")
    options = FluxOptions(second_derivatives="closed_form", backend="torch")
    with pytest.raises(ValueError, match="closed form of divergence='exact' alone"):
        flux_target(field, torch.randn(6, 2, dtype=F64), SIGMA, options)
