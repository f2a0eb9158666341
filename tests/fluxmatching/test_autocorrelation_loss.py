"""The autocorrelation loss and the step defect: closed forms, matrix exponentials and autograd as truths."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm
from torch import Tensor

from fluxmatching import (
    CosineFeatures,
    LinearFeatures,
    QuadraticFeatures,
    autocorrelation_loss,
    step_defect_loss,
)
from fluxmatching.losses.dual import Gradients, ValuedFeatures

TURN = torch.tensor([[0.0, 2, -1], [-2, 0, 3], [1, -3, 0]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance_of(D: int) -> Tensor:
    a = normal(D, D)
    return a @ a.T / D + 0.5 * torch.eye(D, dtype=torch.float64)


def corners(covariance: Tensor) -> Tensor:
    """Points whose mean is 0 and whose covariance is exactly this one."""
    root = len(covariance) ** 0.5 * torch.linalg.cholesky(covariance).T
    return torch.cat([root, -root])


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: z @ matrix.T


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_loss_of_a_rotating_normal_process_is_its_closed_form(alpha: float) -> None:
    """f = -(1 + αJ) x and p = N(0, 1): E x_t x_0ᵀ = e^{-t} times a rotation by αt, so the time is 1/(1 + α²)."""
    turn = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)
    x, field = corners(torch.eye(2, dtype=torch.float64)), linear(-torch.eye(2) - alpha * turn)
    found = autocorrelation_loss(field, x, ridge=1e-12)
    torch.testing.assert_close(found, torch.full((4,), 1 / (1 + alpha**2), dtype=torch.float64))
    # The ridge divides the rotation by 1.01.
    ridged = autocorrelation_loss(field, x)[0]
    assert ridged.item() == pytest.approx(1.01**2 / (1.01**2 + alpha**2), rel=1e-12)


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_loss_of_a_linear_field_is_the_integral_of_its_autocorrelation(size: float) -> None:
    """B = (-1 + J) Σ⁻¹ keeps N(0, Σ), and E x_t x_0ᵀ = e^{Bt} Σ; the whitened time is ∫ tr Σ⁻¹ e^{Bt} Σ dt."""
    covariance = covariance_of(3)
    precision = torch.linalg.inv(covariance)

    def time(matrix: Tensor) -> float:
        whitened = [m.numpy() for m in (precision, matrix, covariance)]

        def function(t: float) -> float:
            return np.trace(whitened[0] @ expm(t * whitened[1]) @ whitened[2])

        return float(quad_vec(function, 0, 300, epsabs=1e-10, epsrel=1e-10)[0])

    matrix = (-torch.eye(3) + size * TURN) @ precision
    found = autocorrelation_loss(linear(matrix), corners(covariance), ridge=1e-12)[0].item()
    assert found == pytest.approx(time(matrix) / time(-precision), rel=1e-7)
    assert found < 0.95


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[N, K]`, gradients `[N, K, D]` and Laplacians `[N, K]` of functions z `[D]` → `[K]`."""
    hessians = torch.func.vmap(torch.func.hessian(function))(x)
    gradients = torch.func.vmap(torch.func.jacrev(function))(x)
    return torch.func.vmap(function)(x), gradients, hessians.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_loss_is_that_of_matrices_made_by_autograd() -> None:
    x, matrix = normal(60, 3) @ torch.linalg.cholesky(covariance_of(3)).T + 5, normal(3, 3, seed=1)
    cosines = CosineFeatures.draw(x, 6, seed=2)
    mean = x.mean(0)

    def field(z: Tensor) -> Tensor:
        return torch.tanh((z - mean) @ matrix.T) * 2

    def functions(z: Tensor) -> Tensor:
        products = torch.outer(z - mean, z - mean)[tuple(torch.triu_indices(3, 3))]
        angles = cosines.frequencies @ (z - cosines.center) + cosines.phases
        return torch.cat([z, products, torch.cos(angles)])

    phi, gradients, laplacians = by_autograd(functions, x)
    phi = phi - phi.mean(0)
    energy = torch.einsum("nkd,nld->kl", gradients, gradients) / 60
    scale = energy.diagonal().rsqrt()
    energy = scale[:, None] * energy * scale + 0.01 * torch.eye(len(scale), dtype=torch.float64)
    generated = torch.einsum("nd,nkd->nk", field(x), gradients) + laplacians
    product = scale[:, None] * (phi.T @ generated / 60) * scale
    cross = (phi.T @ phi / 60)[:3] * scale
    inverse = torch.linalg.inv(cross[:, :3] / scale[:3])
    times = [
        torch.trace(inverse @ cross @ torch.linalg.inv(energy - part * (product - product.T) / 2) @ cross.T)
        for part in (1, 0)
    ]
    found = autocorrelation_loss(field, x, [QuadraticFeatures(), cosines])
    torch.testing.assert_close(found, (times[0] / times[1]).expand(60), rtol=1e-9, atol=0)
    assert found[0] < 0.99


def test_any_rotation_shortens_the_memory_and_its_direction_does_not_matter() -> None:
    x = corners(covariance_of(3))
    precision = torch.linalg.inv(covariance_of(3))
    found = {
        size: autocorrelation_loss(linear((-torch.eye(3) + size * TURN) @ precision), x)[0].item()
        for size in (-2.0, -1.0, 0.0, 1.0, 2.0)
    }
    assert found[0.0] == pytest.approx(1, rel=1e-12)
    assert found[-1.0] == pytest.approx(found[1.0], rel=1e-10)
    assert found[2.0] < found[1.0] < 0.8


def test_gradient_in_the_field_and_events_of_several_dimensions() -> None:
    x, matrix = normal(9, 4), normal(4, 4, seed=4).requires_grad_()
    features = [CosineFeatures.draw(x, 3)]
    assert torch.autograd.gradcheck(lambda m: autocorrelation_loss(linear(m), x, features), matrix)
    assert torch.autograd.gradcheck(lambda m: step_defect_loss(linear(m), x, 0.3), matrix)
    image = x.reshape(9, 2, 2)

    def field(z: Tensor) -> Tensor:
        return (z.flatten(1) @ matrix.T).view_as(z)

    for loss in (lambda f, z: autocorrelation_loss(f, z, features), lambda f, z: step_defect_loss(f, z, 0.3)):
        torch.testing.assert_close(loss(field, image), loss(linear(matrix), x))
        assert loss(field, image).shape == (9,)


def test_data_are_constants_also_for_a_field_that_changes_its_input() -> None:
    x, weight = normal(8, 2).requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    for loss in (autocorrelation_loss(lambda z: z.flip(1).mul_(2) * weight, x).mean(),
                 step_defect_loss(lambda z: z.mul_(2) * weight, x, 0.1).mean()):  # fmt: skip
        loss.backward()
    assert x.grad is None
    assert torch.equal(x, before)


@pytest.mark.parametrize("constant", [0.0, 0.1, 5.0])
def test_a_constant_coordinate_changes_nothing(constant: float) -> None:
    x = normal(64, 2)
    wider = torch.cat([x, torch.full((64, 1), constant, dtype=torch.float64)], 1)
    cosines = CosineFeatures.draw(wider, 8)
    narrow = CosineFeatures(cosines.frequencies[:, :2], cosines.phases, cosines.center[:2])

    def turning(z: Tensor) -> Tensor:
        return torch.stack([-z[:, 0] + 2 * z[:, 1], -z[:, 1] - 2 * z[:, 0]], 1)

    def field(z: Tensor) -> Tensor:  # it would move the constant coordinate, too
        return torch.cat([turning(z), z[:, :1] + 1], 1)

    torch.testing.assert_close(autocorrelation_loss(field, wider, cosines), autocorrelation_loss(turning, x, narrow))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_far_from_the_origin_and_under_autocast(offset: float) -> None:
    x = (normal(256, 3) @ torch.linalg.cholesky(covariance_of(3)).T + offset).float()
    mean, features = x.double().mean(0), CosineFeatures.draw(x.double(), 16)

    def field(z: Tensor) -> Tensor:
        return (z.double() - mean).to(z) @ (-torch.eye(3) + TURN).to(z).T

    for loss in (
        lambda z: autocorrelation_loss(field, z, features)[0],
        lambda z: step_defect_loss(field, z, 0.1).mean(),
    ):
        exact = loss(x.double())
        assert (loss(x).double() - exact).abs() < (1e-5 if offset == 0 else 1e-2) * exact.abs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = autocorrelation_loss(lambda z: -z.flip(1), x, features)
    assert torch.equal(inside, autocorrelation_loss(lambda z: -z.flip(1), x, features))
    assert inside.dtype == torch.float32


def test_step_defect_of_a_linear_field_is_its_closed_form() -> None:
    covariance, h = covariance_of(3), 0.2
    matrix = normal(3, 3, seed=5)
    found = step_defect_loss(linear(matrix), corners(covariance), h)
    square = matrix @ matrix
    wanted = h**3 / 6 * torch.trace(square @ covariance @ square.T)
    assert found.shape == (6,)
    torch.testing.assert_close(found.mean(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(step_defect_loss(lambda z: torch.ones_like(z), corners(covariance), h), 0 * found)


class WithoutValues:
    """A family that the dual loss takes."""

    def gradients(self, x: Tensor, refs: Tensor) -> Gradients:
        return LinearFeatures().gradients(x, refs)


def test_which_families_have_values() -> None:
    assert isinstance(LinearFeatures(), ValuedFeatures)
    with pytest.raises(TypeError, match="features must be families of test functions"):
        autocorrelation_loss(lambda z: -z, normal(8, 2), WithoutValues())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be callable"),
        ({"x": torch.randn(1, 2)}, ValueError, "N at least 2"),
        ({"x": torch.full((8, 2), torch.nan)}, ValueError, "x must be finite"),
        ({"x": torch.ones(8, 2)}, ValueError, "no coordinate of x varies"),
        ({"x": torch.randn(8, 2).half()}, TypeError, "x must be float32 or float64"),
        ({"ridge": 0.0}, ValueError, "ridge must be a positive number"),
        ({"ridge": 1e-12, "features": [LinearFeatures()]}, ValueError, "ridge 1e-12 is too small"),
        ({"features": None}, TypeError, "features must be families"),
        ({"features": LinearFeatures}, TypeError, "features must be families"),
        ({"field": lambda z: z * torch.nan}, ValueError, "field must be finite"),
        ({"field": lambda z: z[:, :1]}, ValueError, "field must return the shape of its input"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], text: str) -> None:
    given: dict[str, object] = {"field": lambda z: -z, "x": torch.randn(8, 2), **change}
    with pytest.raises(error, match=text):
        autocorrelation_loss(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("inf"), None, torch.tensor(0.1)])
def test_bad_step_sizes(step_size: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^step_defect_loss: step_size must be a positive number"):
        step_defect_loss(lambda z: -z, torch.randn(8, 2), step_size)  # type: ignore[arg-type]


def test_a_step_to_where_the_field_is_not_finite_is_refused() -> None:
    x = torch.full((4, 2), 2.0)
    with pytest.raises(ValueError, match=r"^step_defect_loss: field after a step of 0.5 must be finite"):
        step_defect_loss(lambda z: torch.where(z > 3, torch.inf, 4.0), x, 0.5)
