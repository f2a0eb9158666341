"""v-Flux Matching and the augmentation loss against closed forms (Appendix E, C.4)."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxkernels as fk
from fluxmatching import (
    CosinePath,
    Draws,
    FluxOptions,
    LearnedHorizon,
    LinearPath,
    LossNormalizer,
    UniformHorizon,
    UniformTimes,
    VarianceExplodingPath,
    VariancePreservingPath,
    VFluxMatching,
    augmentation_loss,
    flux_matching_loss,
    marginal_velocity,
    v_flux_loss,
)
from fluxmatching.flows.paths import Path
from fluxmatching.losses.target import MatchedField, flux_target
from tests.support import oracles, problems

F64 = torch.float64
PATHS = [LinearPath(), LinearPath(0.1), CosinePath(), VariancePreservingPath(), VarianceExplodingPath(0.1, 3.0)]
BY_PATH = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def numbers(path: Path, t: float) -> tuple[float, float, float]:
    """(α, a, b) of the marginal velocity a x + b s(x)."""
    c = path.coefficients(torch.tensor(t, dtype=F64))
    return c.alpha.item(), c.linear.item(), c.score.item()


@BY_PATH
def test_marginal_velocity_is_linear_in_x_and_score(path: Path, backend: str) -> None:
    x, refs, t = torch.randn(6, 2, dtype=F64), torch.randn(9, 2, dtype=F64), 0.4
    alpha, a, b = numbers(path, t)
    sigma = path.coefficients(torch.tensor(t, dtype=F64)).sigma.item()
    expected = a * x + b * fk.kde_score(x, alpha * refs, sigma**2)
    torch.testing.assert_close(marginal_velocity(x, t, refs, path), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("linear", [0.0, 0.7])
@pytest.mark.parametrize("score", [0.0, 1e-9, -1.3])
@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
def test_target_against_autograd(linear: float, score: float, estimator: str, backend: str) -> None:
    """∇r of the mismatch from w = a x + b s, and its way back along the chain, by autograd in float64."""
    x, sigma, tau = torch.randn(8, 3, dtype=F64), 0.8, torch.tensor(0.9, dtype=F64)
    field = problems.smooth_field(3)
    draws = Draws(tau, torch.randn_like(x), torch.randn(4, *x.shape, dtype=F64))
    settings = FluxOptions(divergence="exact", horizon=UniformHorizon(), estimator=estimator)
    got = flux_target(field, x, sigma, settings, draws=draws, matched=MatchedField(linear, score))
    passed = fk.flux_pass(x, x, sigma**2, tau, noise=torch.stack([draws.start, *draws.chain]))
    end = passed.xt.detach().requires_grad_()
    s = fk.kde_score(end, x, sigma**2)
    u = field(end) - linear * end - score * s
    divergence = sum(torch.autograd.grad(u[:, d].sum(), end, create_graph=True)[0][:, d] for d in range(3))
    (gradient,) = torch.autograd.grad((divergence + (u * s).sum(1)).sum(), end)
    if estimator == "cross_chain":
        expected = math.exp(-tau) * passed.transition_average(gradient)
    else:
        start = passed.x0.detach().requires_grad_()
        chain = fk.langevin_chain(start, x, sigma**2, tau, num_steps=4, noise=draws.chain)
        (expected,) = torch.autograd.grad(chain, start, gradient)
    torch.testing.assert_close(got.target, 4 * expected, rtol=1e-8, atol=1e-9)  # 1/q(τ) = 4
    s0 = fk.kde_score(got.x0, x, sigma**2)
    torch.testing.assert_close(got.matched, linear * got.x0 + score * s0)


@BY_PATH
@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
def test_fractions_are_unbiased_and_chunks_exact(path: Path, estimator: str, backend: str) -> None:
    """The mean over all choices of three endpoints of six is the loss with all of them, in three strata."""
    x, refs, network = torch.randn(6, 2, dtype=F64), torch.randn(9, 2, dtype=F64), TimeNetwork()
    t, tau = torch.tensor([0.2, 0.5, 0.8], dtype=F64), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    numbers = tau, torch.randn_like(x), torch.randn(4, *x.shape, dtype=F64), torch.randn_like(x).sign()

    def loss(endpoints: tuple[int, ...] | None = None, **options: Any) -> Tensor:
        draws = Draws(*numbers, None if endpoints is None else torch.tensor(endpoints))
        return v_flux_loss(network, x, t, path, FluxOptions(estimator=estimator, **options), refs=refs, draws=draws)

    whole = loss()
    parts = [loss(chosen, endpoint_fraction=0.5) for chosen in combinations(range(6), 3)]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss(chunk_size=4), whole, rtol=1e-9, atol=1e-10)


def test_matching_the_score_itself(backend: str) -> None:
    x, field = torch.randn(8, 2, dtype=F64), problems.smooth_field(2)
    plain = flux_target(field, x, 0.6, seed=1)
    given = flux_target(field, x, 0.6, matched=MatchedField(0.0, 1.0), seed=1)
    torch.testing.assert_close(given.target, plain.target, rtol=1e-12, atol=1e-13)


@BY_PATH
@pytest.mark.parametrize("t", [0.15, 0.5, 0.9])
def test_oracle_of_a_gaussian(path: Path, t: float, backend: str) -> None:
    """Reference points at zero: f = v + U x has E ℓ = 2 (1 - e⁻⁸) |sym U|² for τ ~ U[0, 4], on every path and time."""
    U = torch.randn(2, 2, dtype=F64)
    zeros = torch.zeros(512, 2, dtype=F64)
    _, a, b = numbers(path, t)
    variance = path.coefficients(torch.tensor(t, dtype=F64)).sigma.item() ** 2

    def field(x: Tensor, times: Tensor) -> Tensor:
        assert times.shape == x.shape[:1]
        return a * x - b / variance * x + x @ U.T

    def loss(draws: Draws) -> Tensor:
        options = FluxOptions(horizon=UniformHorizon())
        return v_flux_loss(field, zeros, t, path, options, refs=zeros[:1], draws=draws)

    mean, error = problems.estimate(40, loss)
    truth = oracles.gaussian_flux_loss(U.numpy())
    assert abs(mean - truth) < 4 * error, f"{mean} ± {error} against {truth}"
    assert error < 0.1 * truth


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_field_that_keeps_the_path_costs_nothing(t: float, backend: str) -> None:
    """v + J∇ψ/p at p_t of three points has loss 0 to rounding; its violating twin v + ∇ψ/p has not."""
    path, means = LinearPath(), torch.tensor([[0.0, 1.5], [-1.3, -0.75], [1.3, -0.75]], dtype=F64)
    alpha, a, b = numbers(path, t)
    variance = (1 - t) ** 2

    def field(violating: bool) -> Any:
        def bump(x: Tensor) -> Tensor:
            return 0.02 * torch.exp(-(x - alpha * means[0]).square().sum(1) / variance)  # below p everywhere

        def velocity(x: Tensor, times: Tensor) -> Tensor:
            turned = problems.rotated(bump, x, lambda y: fk.kde_log_density(y, alpha * means, variance))
            turned = torch.stack((turned[:, 1], -turned[:, 0]), 1) if violating else turned
            return a * x + b * fk.kde_score(x, alpha * means, variance) + turned

        return velocity

    def estimate(violating: bool) -> tuple[float, float]:
        options = FluxOptions(horizon=UniformHorizon(), divergence="exact")

        def loss(draws: Draws) -> Tensor:
            x = means[torch.randint(3, (256,))]
            return v_flux_loss(field(violating), x, t, path, options, refs=means, draws=draws)

        return problems.estimate(32, loss)

    violating, error = estimate(True)
    assert violating > 4 * error
    assert abs(estimate(False)[0]) < 1e-9 * violating


def test_strata_have_times_of_their_own(backend: str) -> None:
    """A minibatch in strata equals its parts, each with its own time, when the references are shared."""
    x, refs, network = torch.randn(12, 2, dtype=F64), torch.randn(20, 2, dtype=F64), TimeNetwork()
    draws = Draws(
        torch.tensor([0.5, 1.0, 2.0], dtype=F64), torch.randn_like(x), torch.randn(4, *x.shape, dtype=F64),
        torch.randn_like(x).sign(),
    )  # fmt: skip
    t = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    together = v_flux_loss(network, x, t, refs=refs, draws=draws)
    for k in range(3):
        rows = slice(4 * k, 4 * k + 4)
        part = Draws(draws.tau[k], draws.start[rows], draws.chain[:, rows], draws.probe[rows])
        alone = v_flux_loss(network, x[rows], t[k], refs=refs, draws=part)
        torch.testing.assert_close(together[rows], alone, rtol=1e-9, atol=1e-11)


class TimeNetwork(nn.Module):
    """A small field f(x, t) in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.unsqueeze(1)], 1))


@pytest.mark.parametrize("second_derivatives", ["forward_over_reverse", "finite_difference"])
def test_methods_agree_along_a_path(second_derivatives: str, backend: str) -> None:
    x, network = torch.randn(16, 2, dtype=F64), TimeNetwork()
    found = v_flux_loss(network, x, 0.6, options=FluxOptions(second_derivatives=second_derivatives), seed=4)
    exact = v_flux_loss(network, x, 0.6, options=FluxOptions(second_derivatives="double_backward"), seed=4)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_module_trains_network_normalizer_and_horizon(backend: str) -> None:
    network, horizon = TimeNetwork(), LearnedHorizon(8).double()
    module = VFluxMatching(
        network,
        options=FluxOptions(horizon=horizon),
        normalizer=LossNormalizer(8).double(),
        times=UniformTimes(0.1, 0.9),
    )
    loss, logged = module(torch.randn(64, 2, dtype=F64), seed=3)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert set(logged) == {"loss", "flux", "tau", "t"}
    assert 0.1 < logged["t"] < 0.9
    # More reference points are used.
    x, more = torch.randn(64, 2, dtype=F64), torch.randn(500, 2, dtype=F64)
    of_module, _ = VFluxMatching(network, refs=more)(x, seed=3)
    of_minibatch, _ = VFluxMatching(network)(x, seed=3)
    assert of_module != of_minibatch


def test_without_a_normalizer_losses_are_in_units_of_the_velocity(backend: str) -> None:
    """At one time of one stratum the mean is that of ℓ σ²/2."""
    x, network = torch.randn(9, 2, dtype=F64), TimeNetwork()
    times = UniformTimes(0.6, 0.6 + 1e-12)
    loss, logged = VFluxMatching(network, CosinePath(), times=times)(x, seed=3)
    alone = v_flux_loss(network, x, 0.6, CosinePath(), seed=3).mean()
    torch.testing.assert_close(logged["flux"], alone)
    torch.testing.assert_close(loss, alone * math.cos(0.3 * math.pi) ** 2 / 2)


def test_augmentation_loss(backend: str) -> None:
    """u = v alone: zero for v = 0, 2 (1 - e⁻⁸) |sym U|² for v = U x at a Gaussian."""
    zeros, U = torch.zeros(512, 2, dtype=F64), torch.randn(2, 2, dtype=F64)
    options = FluxOptions(horizon=UniformHorizon())
    assert augmentation_loss(torch.zeros_like, zeros, 0.7, options, refs=zeros[:1], seed=1).abs().max() == 0
    mean, error = problems.estimate(
        40, lambda draws: augmentation_loss(lambda z: z @ U.T, zeros, 0.7, options, refs=zeros[:1], draws=draws)
    )
    truth = oracles.gaussian_flux_loss(U.numpy())
    assert abs(mean - truth) < 4 * error
    # On top of the score it is the loss of the sum.
    x, field = torch.randn(32, 2, dtype=F64), problems.smooth_field(2)
    above = augmentation_loss(field, x, 0.7, FluxOptions(divergence="exact"), seed=2)
    summed = flux_matching_loss(
        lambda z: field(z) + fk.kde_score(z, x, 0.49), x, 0.7, FluxOptions(divergence="exact"), seed=2
    )
    torch.testing.assert_close(above, summed, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"t": 0.0}, ValueError, "t must have alpha > 0 and sigma > 0"),
        ({"t": 1.0}, ValueError, "t must have alpha > 0 and sigma > 0"),
        ({"t": 1.5}, ValueError, r"t must lie in \[0, 1\]"),
        ({"t": torch.rand(5)}, ValueError, "strata must divide the 8 samples of x, got 5"),
        ({"options": FluxOptions(grouped=True)}, ValueError, "grouped must be False"),
        ({"options": FluxOptions(second_derivatives="closed_form")}, ValueError, "closed_form"),
        (
            {"options": FluxOptions(strata=2), "t": torch.rand(4)},
            ValueError,
            r"one per stratum, shape \[2\], got shape \[4\]",
        ),
        ({"path": 3}, TypeError, "path must be a Path"),
        ({"field": None}, TypeError, "field must be callable"),
        ({"field": lambda x, t: x[:, :1]}, ValueError, "field must return the shape of its input"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"field": lambda x, t: x, "x": torch.randn(8, 2), "t": 0.5}
    given.update(change)
    with pytest.raises(error, match=text):
        v_flux_loss(given.pop("field"), given.pop("x"), given.pop("t"), **given)
