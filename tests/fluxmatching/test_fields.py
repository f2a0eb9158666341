"""Fields made from denoisers, noise predictions and flow velocities, on data whose score is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fluxkernels as fk
from fluxmatching import (
    NoiseAnnealedFluxMatching,
    field_from_denoiser,
    field_from_noise_prediction,
    field_from_velocity,
)
from fluxmatching.fields import NoisyField, call_field

F64 = torch.float64
DATA = torch.randn(7, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def posterior_mean(z: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x + σ n = z] for x uniform over DATA, written out sample by sample."""
    levels = sigma.expand(len(z))
    means = []
    for point, level in zip(z, levels, strict=True):
        logits = -(point - DATA).flatten(1).square().sum(1) / (2 * level**2)
        means.append((logits.softmax(0).reshape(-1, 1, 1) * DATA).sum(0))
    return torch.stack(means)


def score(z: Tensor, sigma: Tensor) -> Tensor:
    levels = sigma.square().expand(len(z))
    return fk.kde_score(z.flatten(1), DATA.flatten(1), levels, backend="torch").reshape(z.shape)


def noise_prediction(z: Tensor, sigma: Tensor) -> Tensor:
    return (z - posterior_mean(z, sigma)) / sigma.reshape(-1, 1, 1)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """Marginal velocity E[x1 - x0 | x_t = x] of x_t = t x1 + (1-t) x0, from the posterior mean of x1."""
    time = t.reshape(-1, 1, 1)
    clean = posterior_mean(x / time, (1 - t) / t)
    return clean - (x - time * clean) / (1 - time)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("make", "prediction"),
    [
        (field_from_denoiser, posterior_mean),
        (field_from_noise_prediction, noise_prediction),
        (field_from_velocity, velocity),
    ],
)
def test_field_is_the_score(make: object, prediction: object, per_sample: bool) -> None:
    z = torch.randn(5, 2, 3, dtype=F64)
    for level in (0.05, 0.7, 20.0):
        sigma = torch.tensor(level, dtype=F64)
        if per_sample:
            sigma = sigma * torch.linspace(0.5, 2.0, 5, dtype=F64)
        torch.testing.assert_close(make(prediction)(z, sigma), score(z, sigma), rtol=1e-9, atol=1e-11)  # type: ignore[operator]


def test_call_field_checks_the_result() -> None:
    z = torch.randn(4, 2)
    assert call_field(lambda z: z.double(), z).dtype == z.dtype
    with pytest.raises(TypeError, match=r"must return a torch\.Tensor, got list"):
        call_field(lambda z: z.tolist(), z)
    with pytest.raises(ValueError, match=r"the shape of its input, \[4, 2\], got \[4\]"):
        call_field(lambda z: z[:, 0], z)
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch\.int64"):
        call_field(lambda z: z.long(), z)


@pytest.mark.parametrize("make", [field_from_denoiser, field_from_noise_prediction, field_from_velocity])
def test_noise_levels_of_an_adapter(make: Callable[[NoisyField], nn.Module]) -> None:
    field, z = make(lambda z, level: z * level.reshape(-1, 1)), torch.randn(4, 2)
    torch.testing.assert_close(field(z, 0.5), field(z, torch.full((4,), 0.5, dtype=F64)))
    with pytest.raises(ValueError, match=r"sigma must be one number or one per sample, got shape \[3\]"):
        field(z, torch.ones(3))
    with pytest.raises(TypeError, match="prediction must be callable, got int"):
        make(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [(), (0.5,), (0.5, torch.zeros(2))])
def test_a_field_of_other_arguments_is_explained(given: tuple[float | Tensor, ...]) -> None:
    number = ["one argument, x;", "two arguments, x and σ, or x and t in a flow;", "three arguments, x, t and labels"]
    fields: list[Callable[..., Tensor]] = [lambda z: z, lambda z, s: z, lambda z, s, labels: z]
    for count, field in enumerate(fields):
        if count == len(given):
            assert call_field(field, torch.ones(2, 1), *given).shape == (2, 1)
            continue
        with pytest.raises(TypeError, match=f"field is called with {number[len(given)]}"):
            call_field(field, torch.ones(2, 1), *given)


def test_a_network_of_other_arguments_is_explained() -> None:
    for field in (nn.Linear(2, 2), NoiseAnnealedFluxMatching(nn.Linear(2, 2))):
        with pytest.raises(
            TypeError, match=r"field is called with two arguments, x and σ.*Linear\.forward\(\) takes 2"
        ):
            _ = call_field(field, torch.ones(8, 2), 0.5) if isinstance(field, nn.Linear) else field(torch.ones(8, 2))
    with pytest.raises(TypeError, match="DenoiserField: prediction is called with two arguments, x and σ or t"):
        field_from_denoiser(nn.Linear(2, 2))(torch.ones(8, 2), 0.5)


def test_errors_inside_a_field_come_through() -> None:
    def field(z: Tensor) -> Tensor:
        return torch.relu(z, z, z)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match=r"^relu\(\)"):
        call_field(field, torch.ones(2, 1))


@pytest.mark.parametrize("make", [field_from_denoiser, field_from_noise_prediction, field_from_velocity])
def test_a_prediction_must_return_a_tensor(make: Callable[[NoisyField], NoisyField]) -> None:
    kind = type(make(score)).__name__
    with pytest.raises(TypeError, match=rf"{kind}: prediction must return a torch\.Tensor, got tuple"):
        make(lambda z, sigma: (z,))(torch.ones(2, 1), torch.tensor(0.5))  # type: ignore[arg-type, return-value]
