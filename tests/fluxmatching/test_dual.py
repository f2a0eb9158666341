"""The dual flux loss: closed forms, autograd and Lyapunov equations as truths."""

from collections.abc import Callable

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from fluxmatching import (
    CosineFeatures,
    LinearFeatures,
    QuadraticFeatures,
    dual_flux_loss,
    quadratic_flux_loss,
)
from fluxmatching.losses.dual import Features


def normal_data(samples: int, dimensions: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(data, covariance) of a normal distribution about (1, 2, …)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    covariance = a @ a.T / dimensions + 0.5 * torch.eye(dimensions, dtype=torch.float64)
    noise = torch.randn(samples, dimensions, generator=generator, dtype=torch.float64)
    x = noise @ torch.linalg.cholesky(covariance).T
    return x + torch.arange(1.0, dimensions + 1, dtype=torch.float64), covariance


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: z @ matrix.T


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients `[N, K, D]` and Laplacians `[N, K]` of functions z `[D]` → `[K]`."""
    gradients = torch.func.vmap(torch.func.jacrev(function))(x)
    hessians = torch.func.vmap(torch.func.hessian(function))(x)
    return gradients, hessians.diagonal(dim1=-2, dim2=-1).sum(-1)


COSINES = CosineFeatures.draw(normal_data(50, 3)[0], 7, variables=2, seed=1)
FAMILIES: dict[str, tuple[Features, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (LinearFeatures(), lambda z, mean: z),
    "quadratic": (
        QuadraticFeatures(),
        lambda z, mean: torch.outer(z - mean, z - mean)[tuple(torch.triu_indices(3, 3))],
    ),
    "cosine": (COSINES, lambda z, mean: torch.cos(COSINES.frequencies @ z + COSINES.phases)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_laplacians_are_those_of_autograd(name: str) -> None:
    features, function = FAMILIES[name]
    x, mean = normal_data(5, 3)[0], normal_data(5, 3)[0].mean(0)
    found = features.gradients(x)
    terms = found.amplitudes[:, :, None] * found.directions
    gradients = x.new_zeros(5, found.laplacians.shape[1], 3).index_add(1, found.owners, terms)
    wanted, laplacians = by_autograd(lambda z: function(z, mean), x)
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.laplacians, laplacians, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", [1, 4])
def test_quadratic_flux_loss_is_the_dual_loss_of_its_functions(D: int) -> None:
    x, _ = normal_data(200, D)
    field = linear(torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    dual = dual_flux_loss(field, x, [LinearFeatures(), QuadraticFeatures()], ridge=1e-13, halves=False).mean()
    torch.testing.assert_close(quadratic_flux_loss(field, x), dual, rtol=1e-9, atol=0)


def test_quadratic_flux_loss_is_the_flux_loss_of_a_linear_field() -> None:
    """The part of f - s that changes p is the gradient Kx with the same E[(f - s)·∇φ]: a Lyapunov equation for K."""
    D = 3
    _, covariance = normal_data(4, D)
    root = torch.linalg.cholesky(covariance)
    # Points whose mean and covariance are exactly those of the distribution.
    x = D**0.5 * torch.cat([root.T, -root.T])
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # f - s = B x with B = A + Σ⁻¹, and its projection on gradients K x, K = Kᵀ, has K Σ + Σ K = B Σ + Σ Bᵀ.
    b = matrix + torch.linalg.inv(covariance)
    right = b @ covariance + covariance @ b.T
    k = torch.from_numpy(solve_continuous_lyapunov(covariance.numpy(), right.numpy()))
    wanted = torch.trace(k @ covariance @ k.T)
    torch.testing.assert_close(quadratic_flux_loss(linear(matrix), x), wanted, rtol=1e-10, atol=0)


def test_fields_that_keep_the_distribution_cost_nothing_and_others_do() -> None:
    x, covariance = normal_data(40_000, 3)
    x = x - x.mean(0)
    precision = torch.linalg.inv(covariance)
    turn = torch.tensor([[0.0, 2, -1], [-2, 0, 3], [1, -3, 0]], dtype=torch.float64)
    keeps, violates = linear(-precision + turn @ precision), linear(-precision + turn)
    features = [LinearFeatures(), QuadraticFeatures(), CosineFeatures.draw(x, 20)]
    values = dual_flux_loss(keeps, x, features)
    error = values.std() / len(x) ** 0.5
    assert values.mean().abs() < 4 * error + 1e-3
    assert dual_flux_loss(violates, x, features).mean() > 0.2


def test_halves_remove_the_variance_of_the_means() -> None:
    """Over many small minibatches, for the same G the mean with halves is that of all data; without it is above."""
    x, covariance = normal_data(100_000, 2)
    field = linear(-torch.linalg.inv(covariance))
    x = x - x.mean(0)
    found = {
        halves: torch.stack([
            dual_flux_loss(field, part, LinearFeatures(), halves=halves).mean() for part in x.split(50)
        ])
        for halves in (True, False)
    }  # fmt: skip
    error = {halves: values.std() / len(values) ** 0.5 for halves, values in found.items()}
    assert found[True].mean().abs() < 4 * error[True]
    # |mean of 50 scores|² is tr Σ⁻¹/50; the ridge divides it by 1.01.
    wanted = torch.trace(torch.linalg.inv(covariance)) / 50 / 1.01
    assert (found[False].mean() - wanted).abs() < 4 * error[False]


def test_gradient_in_the_field_and_events_of_several_dimensions() -> None:
    x, _ = normal_data(9, 4)
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    features = [LinearFeatures(), QuadraticFeatures()]
    assert torch.autograd.gradcheck(lambda m: dual_flux_loss(linear(m), x, features), matrix)
    assert torch.autograd.gradcheck(lambda m: quadratic_flux_loss(linear(m), x), matrix)
    image = x.reshape(9, 2, 2)

    def field(z: Tensor) -> Tensor:
        return (z.flatten(1) @ matrix.T).view_as(z)

    torch.testing.assert_close(dual_flux_loss(field, image, features), dual_flux_loss(linear(matrix), x, features))
    assert dual_flux_loss(field, image, features).shape == (9,)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be callable"),
        ({"x": torch.randn(3, 2)}, ValueError, "N at least 4"),
        ({"x": torch.full((8, 2), torch.nan)}, ValueError, "x must be finite"),
        ({"x": torch.randn(8, 2).half()}, TypeError, "x must be float32 or float64"),
        ({"ridge": 0.0}, ValueError, "ridge must be a positive number"),
        ({"features": []}, ValueError, "features must hold at least one family"),
        ({"features": COSINES}, ValueError, "frequencies have 3 dimensions, points 2"),
        ({"field": lambda z: z[:, :1]}, ValueError, "field must return the shape of its input"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], text: str) -> None:
    given: dict[str, object] = {"field": lambda z: -z, "x": torch.randn(8, 2), "features": LinearFeatures(), **change}
    with pytest.raises(error, match=text):
        dual_flux_loss(**given)  # type: ignore[arg-type]


def test_coinciding_points() -> None:
    with pytest.raises(ValueError, match="all samples of x coincide"):
        quadratic_flux_loss(lambda z: -z, torch.ones(5, 2))
    assert dual_flux_loss(lambda z: -z, torch.ones(6, 2), QuadraticFeatures()).isfinite().all()
