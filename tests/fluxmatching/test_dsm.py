"""Denoising score matching against its definition, and its two targets against each other."""

import pytest
import torch
from torch import Tensor

import fluxkernels as fk
from fluxmatching import Draws
from tests.support.losses import score_matching_loss, target_of
from tests.support.problems import smooth_field

F64 = torch.float64


def test_forms_are_weights_of_one_error(backend: str) -> None:
    x, refs, field = torch.randn(6, 3, dtype=F64), torch.randn(9, 3, dtype=F64), smooth_field(3)
    sigma, start = torch.rand(6, dtype=F64) + 0.4, torch.randn(6, 3, dtype=F64)
    sigma2, z = sigma.square(), x + sigma.unsqueeze(1) * start
    for stable in (True, False):
        mean = fk.kde_mean(z, refs, sigma2) if stable else x
        error = (field(z) - (mean - z) / sigma2.unsqueeze(1)).square().sum(1)
        for form, weight in (("x0", sigma2**2), ("eps", sigma2)):
            got = score_matching_loss(field, x, sigma, refs=refs, form=form, stable=stable, draws=Draws(start=start))
            torch.testing.assert_close(got, weight * error)


def test_score_of_the_kde_costs_nothing(backend: str) -> None:
    x = torch.randn(20, 2, dtype=F64)
    loss = score_matching_loss(lambda z: fk.kde_score(z, x, 0.49), x, 0.7)
    assert loss.abs().max() < 1e-25


def test_single_sample_targets_are_unbiased(backend: str) -> None:
    """Both targets have the same gradient on average; the stable one has the smaller variance."""
    x = torch.randn(2000, 1, dtype=F64)
    slope = torch.zeros((), dtype=F64, requires_grad=True)
    gradients = {}
    for stable in (True, False):
        torch.manual_seed(3)
        gradients[stable] = torch.stack(
            [
                torch.autograd.grad(score_matching_loss(lambda z: slope * z, x, 0.7, stable=stable).mean(), slope)[0]
                for _ in range(40)
            ]
        )
    stable, single = gradients[True], gradients[False]
    spread = ((stable.var() + single.var()) / 40).sqrt()
    assert abs(stable.mean() - single.mean()) < 4 * spread


def test_no_gradient_reaches_the_data(backend: str) -> None:
    x = torch.randn(5, 2, requires_grad=True)
    assert not score_matching_loss(lambda z: z, x, 0.7).requires_grad


def test_same_start_as_the_flux_loss(backend: str) -> None:
    x = torch.randn(5, 2, dtype=F64)
    seen: list[Tensor] = []
    score_matching_loss(lambda z: seen.append(z) or z, x, 0.7, seed=6)
    torch.testing.assert_close(seen[0], target_of(lambda z: z, x, 0.7, seed=6).x0)


def test_bad_input() -> None:
    x = torch.randn(4, 2)
    for options, text in (
        ({"form": "v"}, "form must be one of 'x0', 'eps', got 'v'"),
        ({"draws": Draws(start=x[:3])}, "draws.start must have the shape of x"),
        ({"refs": torch.randn(4, 3)}, "dsm_loss: refs must have shape"),
        ({"draws": Draws(start=x), "seed": 1}, "give draws.start or seed, not both"),
    ):
        with pytest.raises(ValueError, match=text):
            score_matching_loss(lambda z: z, x, 0.7, backend="torch", **options)
    with pytest.raises(ValueError, match="one number or one per sample"):
        score_matching_loss(lambda z: z, x, torch.ones(3), backend="torch")
