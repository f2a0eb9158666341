"""The dual flux loss: closed forms, autograd and Lyapunov equations as truths."""

from collections.abc import Callable

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from fluxmatching import (
    CosineFeatures,
    DualFluxMatching,
    FluxOptions,
    LinearFeatures,
    QuadraticFeatures,
    Trainer,
    TrainingOptions,
    UniformHorizon,
    dual_flux_loss,
    flux_matching_loss,
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


COSINES = CosineFeatures.draw(normal_data(50, 3)[0], 7, num_coordinates=2, seed=1)
FAMILIES: dict[str, tuple[Features, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (LinearFeatures(), lambda z, mean: z),
    "quadratic": (
        QuadraticFeatures(),
        lambda z, mean: torch.outer(z - mean, z - mean)[tuple(torch.triu_indices(3, 3))],
    ),
    "cosine": (COSINES, lambda z, mean: torch.cos(COSINES.frequencies @ (z - COSINES.center) + COSINES.phases)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_laplacians_are_those_of_autograd(name: str) -> None:
    features, function = FAMILIES[name]
    x, mean = normal_data(5, 3)[0], normal_data(5, 3)[0].mean(0)
    found = features.gradients(x, x)
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
    torch.testing.assert_close(quadratic_flux_loss(field, x), dual.expand(200), rtol=1e-9, atol=0)


def test_quadratic_flux_loss_solves_the_lyapunov_equation_of_a_linear_field() -> None:
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
    torch.testing.assert_close(quadratic_flux_loss(linear(matrix), x)[0], wanted, rtol=1e-10, atol=0)


def test_the_flux_matching_loss_is_the_dual_one_times_two_over_the_variance() -> None:
    """Of data in one point the density estimate is a normal distribution itself, whatever the minibatch."""
    sigma, D = 2.0, 2
    matrix = torch.tensor([[0.3, -0.5], [0.1, -0.2]], dtype=torch.float64) - torch.eye(D) / sigma**2
    at_origin = torch.zeros(64, D, dtype=torch.float64)
    found = torch.stack([
        flux_matching_loss(linear(matrix), at_origin, sigma, FluxOptions(horizon=UniformHorizon(8.0)), seed=k).mean()
        for k in range(600)
    ])  # fmt: skip
    corners = sigma * D**0.5 * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    wanted = 2 / sigma**2 * quadratic_flux_loss(linear(matrix), corners)[0]
    assert (found.mean() - wanted).abs() < 4 * found.std() / 600**0.5 + 1e-3 * wanted
    assert found.std() / 600**0.5 < 0.1 * wanted


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
    x, covariance = normal_data(20_000, 2)
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


def test_data_are_constants_also_for_a_field_that_changes_its_input() -> None:
    x = normal_data(8, 2)[0].requires_grad_()
    before, weight = x.detach().clone(), torch.ones((), dtype=torch.float64, requires_grad=True)
    for loss in (dual_flux_loss(lambda z: z.mul_(2) * weight, x, LinearFeatures()).mean(),
                 quadratic_flux_loss(lambda z: z.mul_(2) * weight, x).mean()):  # fmt: skip
        loss.backward()
    assert x.grad is None
    assert torch.equal(x, before)


def test_given_reference_points_the_mean_is_unbiased() -> None:
    """With as many functions as samples, G of the minibatch adds several times the noise, that of other data none."""
    x, covariance = normal_data(26_400, 2)
    refs, mean = x[:20_000], x.mean(0)
    field = linear(-torch.linalg.inv(covariance))
    features = CosineFeatures.draw(refs, 16)
    found = torch.stack([
        dual_flux_loss(lambda z: field(z - mean), part, features, refs=refs).mean() for part in x[20_000:].split(16)
    ])  # fmt: skip
    assert found.mean().abs() < 4 * found.std() / len(found) ** 0.5 + 0.01


@pytest.mark.parametrize("constant", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_coordinate_changes_nothing(constant: float, dtype: torch.dtype) -> None:
    x = normal_data(64, 2)[0].to(dtype)
    wider = torch.cat([x, torch.full((64, 1), constant, dtype=dtype)], 1)
    cosines = CosineFeatures.draw(wider, 8)
    assert (cosines.frequencies[:, 2] == 0).all()
    assert (CosineFeatures.draw(wider, 8, num_coordinates=1).frequencies[:, :2] != 0).any(1).all()

    def field(z: Tensor) -> Tensor:
        return torch.cat([-z[:, :2], torch.zeros_like(z[:, 2:])], 1)

    for features in (LinearFeatures(), QuadraticFeatures(), cosines):
        narrow = CosineFeatures(cosines.frequencies[:, :2], cosines.phases, cosines.center[:2])
        same = narrow if features is cosines else features
        torch.testing.assert_close(
            dual_flux_loss(field, wider, features), dual_flux_loss(lambda z: -z, x, same), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="covariance of x, \\[64, 3\\], is singular"):
        quadratic_flux_loss(field, wider)
    assert quadratic_flux_loss(field, wider, ridge=0.1).isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_far_from_the_origin(offset: float) -> None:
    x = (normal_data(256, 3)[0] + offset).float()  # the same points in both precisions
    features = [LinearFeatures(), QuadraticFeatures(), CosineFeatures.draw(x.double(), 16)]
    mean = x.double().mean(0)

    def field(z: Tensor) -> Tensor:
        return -(z - mean.to(z)) * 0.7

    for loss in (lambda x: dual_flux_loss(field, x, features).mean(), lambda x: quadratic_flux_loss(field, x)[0]):
        exact = loss(x.double())
        assert (loss(x).double() - exact).abs() < 1e-4 * exact.abs() + 1e-3 * (offset > 0)


def test_autocast_and_odd_numbers_of_samples() -> None:
    x = normal_data(7, 2)[0].float()
    features = [LinearFeatures(), CosineFeatures.draw(x, 3)]
    network = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        values = network(x)
        found = dual_flux_loss(network, x, features), quadratic_flux_loss(network, x)
    rounded = dual_flux_loss(lambda z: values.float(), x, features), quadratic_flux_loss(lambda z: values.float(), x)
    for one, other in zip(found, rounded, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    # The mean is that of both halves, of 4 and of 3 samples.
    parts = [LinearFeatures().gradients(x, x)]
    g = [(network(half)).mean(0) for half in (x[:4], x[4:])]
    assert parts[0].laplacians.eq(0).all()
    torch.testing.assert_close(dual_flux_loss(network, x, LinearFeatures()).mean(), (g[0] @ g[1]) / 1.01)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be callable"),
        ({"x": torch.randn(3, 2)}, ValueError, "N at least 4"),
        ({"x": torch.full((8, 2), torch.nan)}, ValueError, "x must be finite"),
        ({"x": torch.randn(8, 2).half()}, TypeError, "x must be float32 or float64"),
        ({"ridge": 0.0}, ValueError, "ridge must be a positive number"),
        ({"ridge": 1e-12, "features": [LinearFeatures(), LinearFeatures()]}, ValueError, "ridge 1e-12 is too small"),
        ({"features": None}, TypeError, "features must be families"),
        ({"features": LinearFeatures}, TypeError, "features must be families"),
        ({"halves": "no"}, TypeError, "halves must be True or False"),
        ({"refs": torch.randn(5, 3)}, ValueError, "refs must have the event shape of x"),
        ({"field": lambda z: z * torch.nan}, ValueError, "field must be finite"),
        ({"features": []}, ValueError, "features must hold at least one family"),
        ({"features": COSINES}, ValueError, "frequencies have 3 dimensions, points 2"),
        ({"field": lambda z: z[:, :1]}, ValueError, "field must return the shape of its input"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], text: str) -> None:
    given: dict[str, object] = {"field": lambda z: -z, "x": torch.randn(8, 2), "features": LinearFeatures(), **change}
    with pytest.raises(error, match=text):
        dual_flux_loss(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.ones(5, 2), "is singular"),
        (torch.full((7, 3), 0.1), "is singular"),
        (torch.randn(4, 6), "is singular"),
    ],
)
def test_quadratic_flux_loss_of_singular_data(x: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quadratic_flux_loss(lambda z: -z, x)
    assert dual_flux_loss(lambda z: -z, x, QuadraticFeatures()).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.ones(5, 2), 4), "no coordinate of x varies"),
        ((torch.randn(1, 2), 4), "N at least 2"),
        ((torch.randn(5, 2), 2.5), "num_features must be a positive integer"),
    ],
)
def test_bad_cosine_features(arguments: tuple[Tensor, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CosineFeatures.draw(*arguments)


@pytest.mark.parametrize("refs", [None, 400])
def test_the_module_trains_the_closed_form_of_a_linear_field(refs: int | None) -> None:
    """Among linear fields without rotation, the score alone has dual loss 0: matrix -Σ⁻¹."""
    x, _ = normal_data(2000, 2)
    x = x - x.mean(0)
    field = torch.nn.Linear(2, 2, dtype=torch.float64)
    torch.nn.utils.parametrize.register_parametrization(field, "weight", Symmetric())
    loss = DualFluxMatching(field, [LinearFeatures(), QuadraticFeatures()], refs=refs)
    options = TrainingOptions(400, 200, lr=0.02, seed=0, progress=False, accelerator="cpu")
    Trainer(loss, x, options, lr_factor=lambda step: 1 - step / 400).run()
    wanted = -torch.linalg.inv(x.T @ x / len(x))
    torch.testing.assert_close(field.weight.detach(), wanted, rtol=0.1, atol=0.05)


class Symmetric(torch.nn.Module):
    """Matrices without an antisymmetric part."""

    def forward(self, matrix: Tensor) -> Tensor:
        return (matrix + matrix.T) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": None}, "features must be families"),
        ({"features": LinearFeatures}, "features must be families"),
        ({"ridge": -1.0}, "ridge must be a positive number"),
        ({"halves": 1}, "halves must be True or False"),
    ],
)
def test_the_module_checks_its_arguments_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^DualFluxMatching: {message}"):
        DualFluxMatching(torch.sin, **{"features": LinearFeatures(), **arguments})  # type: ignore[arg-type]


def test_errors_name_the_argument() -> None:
    x, _ = normal_data(20, 2)
    with pytest.raises(ValueError, match=r"^dual_flux_loss: refs must be finite"):
        dual_flux_loss(torch.sin, x, LinearFeatures(), refs=x * torch.nan)
    for ridge in (None, "", False, -1.0):
        with pytest.raises((TypeError, ValueError), match=r"^quadratic_flux_loss: ridge must be a positive number"):
            quadratic_flux_loss(torch.sin, x, ridge=ridge)  # type: ignore[arg-type]
