"""Flux Matching losses against closed forms, autograd in float64, and the paper's own statements."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxkernels as fk
from fluxkernels import philox
from fluxmatching import Draws, TruncatedExponentialHorizon, UniformHorizon
from tests.support import oracles, problems, published
from tests.support.losses import flux_loss, target_of
from tests.support.problems import smooth_field

F64 = torch.float64


@pytest.mark.parametrize(("estimator", "second_derivatives", "divergence"), problems.METHODS)
def test_gaussian_oracle(estimator: str, second_derivatives: str, divergence: str, backend: str) -> None:
    U = torch.randn(3, 3, dtype=F64)
    mean, error = problems.gaussian(
        U, estimator=estimator, second_derivatives=second_derivatives, divergence=divergence
    )
    truth = oracles.gaussian_flux_loss(U.numpy())
    assert abs(mean - truth) < 4 * error, f"{mean} ± {error} against {truth}"
    assert error < 0.1 * truth


@pytest.mark.parametrize(("estimator", "second_derivatives", "divergence"), problems.METHODS)
def test_antisymmetric_perturbation_of_a_gaussian_costs_nothing(
    estimator: str, second_derivatives: str, divergence: str, backend: str
) -> None:
    D, sigma = 4, 0.7
    U = torch.randn(D, D, dtype=F64)
    loss = flux_loss(
        lambda z: -z / sigma**2 + z @ (U - U.T),
        torch.zeros(64, D, dtype=F64),
        sigma,
        estimator=estimator,
        second_derivatives=second_derivatives,
        divergence=divergence,
    )
    # The difference of two passes over a step of 0.003 keeps 1e-16/0.003 of its digits.
    assert loss.abs().max().item() < (1e-11 if second_derivatives == "finite_difference" else 1e-13)


@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
def test_field_that_preserves_a_mixture(estimator: str, backend: str) -> None:
    """Sec. B.1: s + J∇ψ/p costs nothing, to rounding with an exact divergence; s + ∇ψ/p does."""
    preserving, _ = problems.mixture(violating=False, estimator=estimator, divergence="exact")
    violating, error = problems.mixture(violating=True, estimator=estimator, divergence="exact")
    assert violating > 4 * error
    assert abs(preserving) < 1e-9 * violating


def test_field_that_preserves_a_mixture_under_hutchinson(backend: str) -> None:
    """With probes the loss of a preserving field is zero in expectation only."""
    mean, error = problems.mixture(violating=False, divergence="hutchinson")
    assert abs(mean) < 4 * error
    assert error > 0


def published_gradient(field: nn.Module, x: Tensor, refs: Tensor, sigma2: float, draws: Draws) -> tuple[Tensor, ...]:
    """(x0, s(x0), q̂) as the paper has it: the KDE differentiated twice by autograd, exact divergence."""
    x0 = x + sigma2**0.5 * draws.start
    xt = published.langevin_chain(x0, refs, sigma2, draws.tau.item(), draws.chain)
    end = xt.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        published.residual(field, lambda z: published.kde_score(z, refs, sigma2), end)[0].sum(), end
    )
    w = published.transition_weights(x0, xt, refs, sigma2, draws.tau.item())
    return x0, published.kde_score(x0, refs, sigma2), 4 * torch.exp(-draws.tau) * (w @ gradient)


@pytest.mark.parametrize(("N", "M", "D"), [(6, 6, 2), (5, 40, 3), (4, 9, 20)])
def test_closed_form_residual_gradient_equals_double_backward(N: int, M: int, D: int, backend: str) -> None:
    """Idea 2: J_s f - ∇(Δp̂/p̂) + ∇(∇·f) + J_fᵀs against autograd twice through kde_score, in float64."""
    field, refs, sigma2 = smooth_field(D), torch.randn(M, D, dtype=F64), 0.3 * D
    z = torch.randn(N, D, dtype=F64, requires_grad=True)
    s = fk.kde_score(z, refs, sigma2)
    u = field(z) - s
    divergence = sum(torch.autograd.grad(u[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(D))
    (expected,) = torch.autograd.grad((divergence + (u * s).sum(1)).sum(), z)

    f = field(z)
    score = s.detach()
    divergence = sum(torch.autograd.grad(f[:, d].sum(), z, create_graph=True)[0][:, d] for d in range(D))
    (bracket,) = torch.autograd.grad((divergence + (f * score).sum(1)).sum(), z)
    got = bracket + fk.residual_gradient(z.detach(), f.detach(), refs, sigma2)
    assert torch.linalg.vector_norm(got - expected) < 1e-10 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_whole_target_against_the_published_algorithm(second_derivatives: str, backend: str) -> None:
    """Algorithm 1 with autograd throughout, the same random numbers: x0, s(x0), q̂ and the loss."""
    x, refs, sigma2 = torch.randn(7, 3, dtype=F64), torch.randn(11, 3, dtype=F64), 0.8
    draws = Draws(torch.tensor(1.2, dtype=F64), torch.randn_like(x), torch.randn(4, *x.shape, dtype=F64))
    field = smooth_field(3)
    x0, score, target = published_gradient(field, x, refs, sigma2, draws)
    options: dict[str, Any] = {
        "horizon": UniformHorizon(),
        "refs": refs,
        "divergence": "exact",
        "second_derivatives": second_derivatives,
        "draws": draws,
    }
    got = target_of(field, x, sigma2**0.5, **options)
    close = {"rtol": 1e-9, "atol": 1e-10} if second_derivatives != "finite_difference" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.x0, x0)
    torch.testing.assert_close(got.score, score)
    torch.testing.assert_close(got.target, target, **close)
    loss = flux_loss(field, x, sigma2**0.5, **options)
    torch.testing.assert_close(loss, -2 * ((field(x0) - score) * target).sum(1), **close)


def test_single_chain_against_autograd_through_the_chain(backend: str) -> None:
    """∇_{x0} r(x_τ) of Sec. D.2: one backward pass through the whole chain."""
    x, sigma2 = torch.randn(6, 2, dtype=F64), 0.8
    draws = Draws(torch.tensor(0.9, dtype=F64), torch.randn_like(x), torch.randn(4, *x.shape, dtype=F64))
    field = smooth_field(2)
    x0 = (x + sigma2**0.5 * draws.start).requires_grad_()
    xt = published.langevin_chain(x0, x, sigma2, 0.9, draws.chain)
    (pathwise,) = torch.autograd.grad(
        published.residual(field, lambda z: published.kde_score(z, x, sigma2), xt)[0].sum(), x0
    )
    options: dict[str, Any] = {"estimator": "single_chain", "divergence": "exact", "horizon": UniformHorizon()}
    got = target_of(field, x, sigma2**0.5, draws=draws, **options)
    torch.testing.assert_close(got.target, 4 * pathwise, rtol=1e-9, atol=1e-10)


def test_gradient_reaches_the_field_through_u_alone(backend: str) -> None:
    field, x = smooth_field(2), torch.randn(8, 2, dtype=F64)
    target = target_of(field, x, 0.7, seed=1)
    assert not target.target.requires_grad
    expected = torch.autograd.grad(
        (-2 * (field(target.x0) - target.score) * target.target).sum(), list(field.parameters())
    )
    flux_loss(field, x, 0.7, seed=1).sum().backward()
    for p, g in zip(field.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_chunks_do_not_change_the_answer(second_derivatives: str, divergence: str, backend: str) -> None:
    field, x = smooth_field(2), torch.randn(7, 2, dtype=F64)
    options: dict[str, Any] = {"second_derivatives": second_derivatives, "divergence": divergence, "seed": 3}
    whole = flux_loss(field, x, 0.7, **options)
    for chunk in (1, 3, 7, 100):
        torch.testing.assert_close(flux_loss(field, x, 0.7, chunk_size=chunk, **options), whole)


def test_grouped_loss_is_the_sum_over_groups(backend: str) -> None:
    """Each group has its own KDE and, here, its own τ; the field acts on groups independently."""
    G, N = 3, 6
    x, refs = torch.randn(N, G, 2, dtype=F64), torch.randn(9, G, 2, dtype=F64)
    field = smooth_field(2)
    draws = Draws(
        torch.tensor([0.5, 1.0, 2.0], dtype=F64),
        torch.randn_like(x),
        torch.randn(4, *x.shape, dtype=F64),
        torch.randn_like(x).sign(),
    )
    sigma = torch.tensor([0.6, 0.8, 0.9], dtype=F64)
    for divergence in ("hutchinson", "exact"):
        options: dict[str, Any] = {"divergence": divergence}
        grouped = flux_loss(field, x, sigma, refs=refs, grouped=True, draws=draws, **options)
        alone = [
            flux_loss(
                field,
                x[:, g],
                sigma[g],
                refs=refs[:, g],
                draws=Draws(draws.tau[g], draws.start[:, g], draws.chain[:, :, g], draws.probe[:, g]),
                **options,
            )
            for g in range(G)
        ]
        torch.testing.assert_close(grouped, sum(alone))
        by_group = target_of(field, x, sigma, refs=refs, grouped=True, draws=draws, **options).terms(field)
        torch.testing.assert_close(by_group.sum(-1).mT, torch.stack(alone))


def test_shared_centers_of_a_grouped_loss(backend: str) -> None:
    x, refs = torch.randn(6, 3, 2, dtype=F64), torch.randn(9, 1, 2, dtype=F64)
    field = smooth_field(2)
    a = flux_loss(field, x, 0.7, refs=refs, grouped=True, seed=1)
    torch.testing.assert_close(a, flux_loss(field, x, 0.7, refs=refs.expand(9, 3, 2), grouped=True, seed=1))


def test_images_are_flattened(backend: str) -> None:
    x = torch.randn(5, 2, 3, 4, dtype=F64)
    field = nn.Conv2d(2, 2, 3, padding=1).double()
    flat = flux_loss(lambda z: field(z.reshape(5, 2, 3, 4)).reshape(5, -1), x.reshape(5, -1), 0.7, seed=2)
    torch.testing.assert_close(flux_loss(field, x, 0.7, seed=2), flat)


@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
@pytest.mark.parametrize("grouped", [False, True])
def test_seed_is_the_draws_it_stands_for(estimator: str, grouped: bool, backend: str) -> None:
    x, field = torch.randn(6, 3, 2, dtype=F64), smooth_field(2)
    horizon = TruncatedExponentialHorizon(1.5)
    options: dict[str, Any] = {"estimator": estimator, "grouped": grouped, "horizon": horizon}
    draws = Draws.from_seed(11, x, horizon, grouped=grouped)
    by_seed = flux_loss(field, x, 0.7, seed=11, **options)
    torch.testing.assert_close(by_seed, flux_loss(field, x, 0.7, draws=draws, **options))
    # Any part may be given; the rest comes from the seed.
    for part in ({"tau": draws.tau}, {"start": draws.start}, {"chain": draws.chain}, {"probe": draws.probe}):
        torch.testing.assert_close(flux_loss(field, x, 0.7, seed=11, draws=Draws(**part), **options), by_seed)
    assert not torch.allclose(by_seed, flux_loss(field, x, 0.7, seed=12, **options))


def test_draws_of_a_seed_come_from_their_own_streams() -> None:
    x, seed = torch.zeros(3, 5), torch.tensor(9)
    draws = Draws.from_seed(seed, x, UniformHorizon())
    assert torch.equal(draws.probe, philox.rademacher(seed, (1, 3, 5), philox.PROBE, x.dtype)[0])
    assert torch.equal(draws.start, philox.normal(seed, (1, 3, 5), philox.START, x.dtype)[0])
    assert torch.equal(draws.chain, philox.normal(seed, (4, 3, 5), philox.CHAIN, x.dtype))
    assert draws.tau == 4 * philox.uniform(seed, (1,), philox.HORIZON, x.dtype)[0]
    with pytest.raises(TypeError, match="seed must be an integer"):
        Draws.from_seed(1.5, x, UniformHorizon())


def test_torch_generator_decides_without_a_seed(backend: str) -> None:
    x, field = torch.randn(6, 2), smooth_field(2).float()

    def loss() -> Tensor:
        return flux_loss(field, x, 0.7)

    torch.manual_seed(1)
    first, second = loss(), loss()
    torch.manual_seed(1)
    assert torch.equal(first, loss())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_nothing_is_drawn_that_is_given_or_not_needed(divergence: str, backend: str) -> None:
    x, field = torch.randn(6, 2), smooth_field(2).float()
    given = Draws.from_seed(1, x, UniformHorizon())
    draws = Draws(given.tau, given.start, given.chain, given.probe if divergence == "hutchinson" else None)
    before = torch.get_rng_state()
    flux_loss(field, x, 0.7, draws=draws, divergence=divergence)
    assert torch.equal(before, torch.get_rng_state())


def test_horizon_does_not_change_the_mean(backend: str) -> None:
    """Importance sampling of τ: two distributions, one expectation."""
    U = torch.diag(torch.tensor([1.0, -0.5], dtype=F64))
    x = torch.zeros(256, 2, dtype=F64)
    truth = oracles.gaussian_flux_loss(U.numpy())
    for horizon in (UniformHorizon(), TruncatedExponentialHorizon(2.0)):
        means = torch.stack(
            [flux_loss(lambda z: -z + z @ U.T, x, 1.0, horizon=horizon, divergence="exact").mean() for _ in range(150)]
        )
        error = (means.std() / len(means) ** 0.5).item()
        assert abs(means.mean().item() - truth) < 4 * error
    # e^{-2τ} is the loss's own shape: that horizon is much the less noisy of the two.
    assert error < 0.1 * truth


def test_autocast_field_in_half_precision(backend: str) -> None:
    field, x = smooth_field(2).float(), torch.randn(64, 2)
    exact = flux_loss(field, x, 0.7, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = flux_loss(field, x, 0.7, seed=1)
    assert half.dtype == torch.float32
    assert torch.linalg.vector_norm(half - exact) < 0.2 * torch.linalg.vector_norm(exact)


def test_central_difference_in_half_precision(backend: str) -> None:
    """Its step is larger there: with that of float32 the rounding of two near passes would drown the difference."""
    field, x = smooth_field(2).float(), torch.randn(64, 2)
    exact = target_of(field, x, 0.7, seed=1).target
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = target_of(field, x, 0.7, seed=1, second_derivatives="finite_difference").target
    halved = copy.deepcopy(field).bfloat16()
    cast = target_of(lambda z: halved(z.bfloat16()), x, 0.7, seed=1, second_derivatives="finite_difference").target
    for central in (autocast, cast):
        assert torch.linalg.vector_norm(central - exact) < 0.015 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 1.0])
def test_central_difference_follows_fields_that_bend_over_sigma(backend: str, sigma: float) -> None:
    """Far below the data's spread a learned field bends over σ: here a fine ripple on a Gaussian's score."""
    x = torch.randn(64, 2, dtype=F64)
    smooth = lambda z: -z / (1 + sigma**2)  # noqa: E731
    rippled = lambda z: smooth(z) + torch.sin(z.flip(-1) / (2 * sigma))  # noqa: E731
    exact, central = (
        target_of(rippled, x, sigma, seed=1, second_derivatives=e).target
        for e in ("double_backward", "finite_difference")
    )
    of_the_ripple = exact - target_of(smooth, x, sigma, seed=1).target
    assert torch.linalg.vector_norm(central - exact) < 1e-3 * torch.linalg.vector_norm(of_the_ripple)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_central_difference_far_from_the_origin(backend: str, offset: float) -> None:
    """z ± step is exact in float32, so an offset that the field takes off costs nothing."""
    net, x = smooth_field(2).float(), torch.randn(64, 2) + offset
    field = lambda z: net(z - offset)  # noqa: E731
    exact, central = (
        target_of(field, x, 0.7, seed=1, second_derivatives=e).target for e in ("double_backward", "finite_difference")
    )
    assert torch.linalg.vector_norm(central - exact) < 2e-5 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("second_derivatives", ["double_backward", "finite_difference"])
def test_a_network_that_begins_in_place(second_derivatives: str) -> None:
    net = nn.Sequential(nn.SiLU(inplace=True), nn.Linear(2, 2))
    same = nn.Sequential(nn.SiLU(), net[1])
    x = torch.randn(8, 2)
    found, expected = (target_of(f, x, 0.7, seed=1, second_derivatives=second_derivatives).target for f in (net, same))
    assert torch.equal(found, expected)


def test_central_difference_is_free_of_units(backend: str) -> None:
    """x and σ in other units: the step, a power of two, follows, so the relative error stays."""
    field = smooth_field(2)
    x = torch.randn(64, 2, dtype=F64)
    errors = []
    for unit in (2.0**-10, 1.0, 2.0**10):
        scaled = lambda z, unit=unit: field(z / unit) / unit  # noqa: E731
        exact, central = (
            target_of(scaled, unit * x, 0.7 * unit, seed=1, second_derivatives=e).target
            for e in ("double_backward", "finite_difference")
        )
        errors.append((torch.linalg.vector_norm(central - exact) / torch.linalg.vector_norm(exact)).item())
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    assert errors[2] == pytest.approx(errors[1], rel=1e-2)
    assert errors[1] < 1e-4


def test_chunk_bounds_what_the_field_sees(backend: str) -> None:
    sizes: list[int] = []

    def field(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return -z

    target_of(field, torch.randn(7, 2), 0.7, second_derivatives="double_backward", chunk_size=3)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_default_endpoint_is_exact_where_exactness_is_asked_for(dtype: torch.dtype, divergence: str) -> None:
    field, x = smooth_field(2).to(dtype), torch.randn(16, 2, dtype=dtype)
    found = {
        method: target_of(field, x, 0.7, seed=1, divergence=divergence, second_derivatives=method).target
        for method in ("double_backward", "finite_difference", None)
    }
    exact = dtype == F64 or divergence == "exact"
    assert torch.equal(found[None], found["double_backward" if exact else "finite_difference"])
    assert not torch.equal(found["double_backward"], found["finite_difference"])


def test_importance_weight_is_detached_from_a_learned_horizon(backend: str) -> None:
    horizon, x = TruncatedExponentialHorizon(1.0, learned=True), torch.randn(5, 2)
    for estimator in ("cross_chain", "single_chain"):
        target = target_of(lambda z: -z, x, 0.7, horizon=horizon, estimator=estimator)
        assert not target.target.requires_grad


def test_dropout_sees_one_mask_on_both_sides_of_a_difference(backend: str) -> None:
    """With two masks the difference over a small step would be of the order of 1/step."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    x = torch.randn(32, 2, dtype=F64)
    sizes = [
        target_of(field, x, 0.7, second_derivatives=e, seed=1).target.norm()
        for e in ("double_backward", "finite_difference")
    ]
    assert sizes[1] < 3 * sizes[0]
