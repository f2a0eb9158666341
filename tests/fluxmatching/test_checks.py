"""Bad input to the loss: the message names the argument, what it takes and what it got."""

from typing import Any

import pytest
import torch

from fluxmatching import Draws, UniformHorizon, flux_matching_loss

X = torch.randn(6, 2)


def loss(field: Any = lambda z: -z, x: Any = X, sigma2: Any = 0.5, **options: Any) -> Any:
    return flux_matching_loss(field, x, sigma2, backend="torch", **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"x": X.tolist()}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X[:, 0]}, ValueError, r"x must have shape \[N, \*event\], got \[6\]"),
        ({"x": X.index_fill(0, torch.tensor(2), torch.nan)}, ValueError, "x must be finite"),
        ({"x": X[:0]}, ValueError, "x must not be empty"),
        ({"sigma2": 0.0}, ValueError, "sigma2 must be a positive finite number, got 0.0"),
        ({"sigma2": torch.ones(6)}, ValueError, "sigma2"),
        ({"refs": torch.randn(9, 3)}, ValueError, r"refs must have shape \[M, \*event\] .* got \[9, 3\]"),
        ({"refs": X.double()}, TypeError, "refs must have the dtype of the first argument"),
        (
            {"estimator": "both"},
            ValueError,
            "estimator must be one of 'cross_chain', 'single_chain', got 'both'",
        ),
        ({"endpoint": "backward"}, ValueError, "endpoint must be one of 'reverse', 'forward', 'central'"),
        ({"divergence": "none"}, ValueError, "divergence must be one of 'hutchinson', 'exact'"),
        ({"chunk": 0}, ValueError, "chunk must be None or a positive number of samples, got 0"),
        ({"chunk": 1.5}, ValueError, "chunk must be"),
        ({"steps": 0}, ValueError, "steps must be a positive integer"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must lie in"),
        ({"grouped": True}, ValueError, r"a grouped loss takes x of shape \[N, groups, D\], got \[6, 2\]"),
        (
            {"x": torch.randn(6, 3, 2), "refs": torch.randn(9, 2, 2), "grouped": True},
            ValueError,
            r"refs of a grouped loss must have shape \[M, 3 or 1, 2\], got \[9, 2, 2\]",
        ),
        ({"draws": Draws(start=X[:3])}, ValueError, "draws.start must have the shape of x"),
        ({"draws": Draws(probe=X.double())}, TypeError, "draws.probe must have the dtype"),
        ({"draws": Draws(chain=X)}, ValueError, r"draws.chain must have shape \[steps, \*x.shape\]"),
        ({"draws": Draws(tau=torch.tensor(-1.0))}, ValueError, "tau must be a non-negative"),
        (
            {"field": lambda z: z[:, :1]},
            ValueError,
            r"field must return the shape of its input, \[6, 2\], got \[6, 1\]",
        ),
        ({"field": lambda z: 0.0}, TypeError, "field must return a torch.Tensor, got float"),
    ],
)
def test_bad_argument(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        loss(**options)


WEIGHT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("endpoint", ["reverse", "forward", "central"])
@pytest.mark.parametrize(
    "field",
    [
        lambda z: torch.ones_like(z),
        lambda z: z.detach(),
        lambda z: 2 * z,
        lambda z: torch.ones_like(z) * WEIGHT,
    ],
    ids=["constant", "detached", "linear", "ignores z"],
)
def test_fields_without_second_derivatives(field: Any, endpoint: str) -> None:
    """A field may be linear, or not look at z at all: its derivatives are zeros, not errors."""
    assert loss(field, endpoint=endpoint, seed=1).isfinite().all()


def test_one_sample_one_centre() -> None:
    assert loss(x=X[:1], endpoint="central").shape == (1,)


def test_horizon_zero_is_a_limit() -> None:
    a = loss(draws=Draws(tau=torch.tensor(0.0)), seed=1)
    b = loss(draws=Draws(tau=torch.tensor(1e-10)), seed=1)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_horizon_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tau_max must be a positive number, got 0"):
        UniformHorizon(0)
