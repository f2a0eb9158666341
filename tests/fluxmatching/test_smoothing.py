"""Smoothed fields and effective centers against sums in float64 and closed forms of normal data."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fluxkernels import kde_mean
from fluxmatching import FluxMatching, FluxOptions, SmoothedField, effective_centers, flux_matching_loss
from tests.support.problems import smooth_field


def weights(z: Tensor, refs: Tensor, sigma: float) -> Tensor:
    """w_i(z), `[n, M]`, from the distances themselves."""
    return (-(z[:, None] - refs).square().sum(2) / (2 * sigma**2)).softmax(1)


def rotating_field(D: int, covariance: Tensor) -> nn.Linear:
    """f = (I + J) s, which leaves a centered normal distribution in place, J antisymmetric."""
    turn = torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    field = nn.Linear(D, D, bias=False, dtype=torch.float64)
    matrix = -(torch.eye(D, dtype=torch.float64) + (turn - turn.T)) @ torch.linalg.inv(covariance)
    field.weight = nn.Parameter(matrix)
    return field


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_smoothed_field_is_the_weighted_sum(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    refs = torch.randn(50, 3, generator=generator, dtype=torch.float64) + 100
    z = refs[:8] + sigma * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    field = smooth_field(3)
    with torch.no_grad():
        wanted = weights(z, refs, sigma) @ field(refs)
        torch.testing.assert_close(SmoothedField(field, refs, sigma)(z), wanted, rtol=1e-9, atol=1e-9)


def test_weights_in_float32_far_from_each_other_are_those_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(10)
    refs = 1000 * torch.randn(40, 1, generator=generator).sign() + 0.05 * torch.randn(40, 3, generator=generator)
    z, field = refs[:9] + 0.05 * torch.randn(9, 3, generator=generator), lambda x: 2 * x.sin()
    wanted = weights(z.double(), refs.double(), 0.05) @ field(refs.double())
    torch.testing.assert_close(SmoothedField(field, refs, 0.05)(z).double(), wanted, rtol=0, atol=3e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found = SmoothedField(field, refs, 0.05)(z)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-4)


def test_a_copy_shares_the_points() -> None:
    x = torch.randn(30, 2)
    smoothed = SmoothedField(smooth_field(2).float(), x, 0.8)
    copied = copy.deepcopy(smoothed)
    torch.testing.assert_close(copied(x), smoothed(x))
    assert copied.refs.points is smoothed.refs.points
    assert not list(smoothed.buffers())
    assert smoothed.double()(x.double()).dtype == torch.float64


def test_smoothed_field_of_the_identity_is_the_posterior_mean() -> None:
    x = torch.randn(40, 2, 2, generator=torch.Generator().manual_seed(1))
    found = SmoothedField(lambda z: z, x, 0.7)(x[:5] + 0.3)
    wanted = kde_mean(x[:5].flatten(1) + 0.3, x.flatten(1), 0.49)
    torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-5, atol=1e-5)


def test_flux_loss_knows_the_true_field_by_its_smoothed_form_only() -> None:
    D, sigma = 3, 2.0
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2000, D, generator=generator, dtype=torch.float64)
    field = rotating_field(D, x.T @ x / len(x))
    options = FluxOptions(estimator="cross_chain", num_steps=20)
    smoothed = SmoothedField(field, x, sigma)
    losses = [flux_matching_loss(f, x[:400], sigma, options, refs=x, seed=3) for f in (smoothed, field)]
    right, raw = (float(loss.detach().mean()) for loss in losses)
    assert raw > 1
    assert abs(right) < 0.01 * raw


def test_parameters_of_the_field_learn_through_it() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = FluxMatching(SmoothedField(smooth_field(2), x, 0.8), 0.8, refs=x)
    names = [name for name, _ in loss.named_parameters()]
    assert names
    assert all(name.startswith("field.field.") for name in names)
    loss(x, seed=0)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert all(value.shape != x.shape for value in loss.state_dict().values() if isinstance(value, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 1e3])
def test_effective_centers_are_the_inverse_of_the_summed_squares(sigma: float, dtype: torch.dtype) -> None:
    refs = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    z = refs[:, :9] + sigma * torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = effective_centers(z.to(dtype), refs.to(dtype), sigma)
    wanted = torch.stack([1 / weights(z[k], refs[k], sigma).square().sum(1) for k in range(2)])
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_effective_centers_with_a_sigma_per_point_or_group() -> None:
    refs = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    z, sigmas = refs[:, :5] + 0.1, torch.tensor([[0.1, 0.5, 1.0, 2.0, 9.0]] * 2, dtype=torch.float64)
    one_by_one = [[effective_centers(z[g, n : n + 1], refs[g], float(sigmas[g, n])) for n in range(5)] for g in (0, 1)]
    wanted = torch.tensor(one_by_one, dtype=torch.float64)
    torch.testing.assert_close(effective_centers(z[0], refs[0], sigmas[0]), wanted[0])
    torch.testing.assert_close(effective_centers(z, refs, sigmas[:, 1]), effective_centers(z, refs, 0.5))
    with pytest.raises(ValueError, match="sigma2 of shape"):
        effective_centers(z[0], refs[0], sigmas[0, :3])


def test_the_log_of_flux_matching_with_a_sigma_per_stratum() -> None:
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(9))
    module = FluxMatching(smooth_field(2).float(), torch.tensor([0.1, 0.5, 1.0, 2.0]), FluxOptions(strata=4))
    assert 1 < module(x, seed=0)[1]["effective_centers"] < 128


def test_effective_centers_of_many_dimensions_stay_in_range() -> None:
    x = torch.randn(20, 3072, generator=torch.Generator().manual_seed(8))
    # Differences of log-densities near 1e4, in float32.
    torch.testing.assert_close(effective_centers(x, x, 0.1), torch.ones(20), rtol=0, atol=2e-3)
    assert effective_centers(x, x, 1e4).min() > 19.9


def test_the_log_of_flux_matching_has_effective_centers_of_groups_too() -> None:
    x = torch.randn(100, 3, 2, generator=torch.Generator().manual_seed(9))
    flat = FluxMatching(smooth_field(2).float(), 0.5)(x[:, 0], seed=0)[1]["effective_centers"]
    assert 1 < flat < 100
    field, options = smooth_field(2).float(), FluxOptions(grouped=True)
    grouped = FluxMatching(field, torch.tensor([0.01, 1.0, 100.0]), options)(x, seed=0)[1]["effective_centers"]
    one, some, all_of_them = 1.0, 100 / 3, 100.0
    assert (one + all_of_them + 10) / 3 < grouped < (one + all_of_them + 100 - some) / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, torch.zeros(3, 2), 1.0), "field must be callable"),
        ((torch.sin, torch.zeros(0, 2), 1.0), "refs must not be empty"),
        ((torch.sin, torch.full((3, 2), torch.nan), 1.0), "refs must be finite"),
        ((torch.sin, torch.zeros(3, 2), 0.0), "sigma must be a positive number"),
        ((smooth_field(2).forward, torch.zeros(3, 2), 1.0), r"field must be a torch\.nn\.Module"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, Tensor, float], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SmoothedField(*arguments)  # type: ignore[arg-type]


def test_points_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z must have the event shape of refs, \[3, 2\], got \[4, 3\]"):
        SmoothedField(torch.sin, torch.zeros(3, 2), 1.0)(torch.zeros(4, 3))
