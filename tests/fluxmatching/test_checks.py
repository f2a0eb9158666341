"""Bad input to the loss: the message names the argument, what it takes and what it got."""

import math
from typing import Any

import pytest
import torch

from fluxmatching import Draws, UniformHorizon
from fluxmatching.losses.options import as_sigma
from tests.support.losses import flux_loss, target_of

X = torch.randn(6, 2)


def loss(field: Any = lambda z: -z, x: Any = X, sigma: Any = 0.7, **options: Any) -> Any:
    return flux_loss(field, x, sigma, backend="torch", **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be callable, got NoneType"),
        ({"x": X.tolist()}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X[:, 0]}, ValueError, r"x must have shape \[N, \*event\], got \[6\]"),
        ({"x": X.index_fill(0, torch.tensor(2), torch.nan)}, ValueError, "x must be finite"),
        ({"x": X[:0]}, ValueError, "x must not be empty"),
        ({"sigma": 0.0}, ValueError, "sigma must be a positive finite number, got 0.0"),
        ({"sigma": 1e-25}, ValueError, "sigma must have a square within the range of torch.float32, got 1e-25"),
        ({"sigma": torch.ones(6)}, ValueError, r"sigma must be one number, got shape \[6\]; NoiseAnnealedFluxM"),
        ({"refs": torch.randn(9, 3)}, ValueError, r"refs must have shape \[M, \*event\] .* got \[9, 3\]"),
        ({"refs": X.double()}, TypeError, "refs must have the dtype of the first argument"),
        (
            {"estimator": "both"},
            ValueError,
            "estimator must be one of 'cross_chain', 'single_chain', got 'both'",
        ),
        (
            {"second_derivatives": "backward"},
            ValueError,
            "second_derivatives must be one of 'double_backward', 'forward_over_reverse', 'finite_difference', ",
        ),
        ({"divergence": "none"}, ValueError, "divergence must be one of 'hutchinson', 'exact'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or a positive number of samples, got 0"),
        ({"chunk_size": 1.5}, ValueError, "chunk_size must be"),
        ({"num_steps": 0}, ValueError, "num_steps must be a positive integer"),
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
        ({"draws": Draws(chain=X)}, ValueError, r"draws.chain must have shape \[num_steps, \*x.shape\]"),
        (
            {"draws": Draws(chain=X.expand(3, 6, 2)), "num_steps": 8},
            ValueError,
            "num_steps must be 3, the length of draws.chain",
        ),
        ({"draws": Draws(tau=torch.tensor(-1.0))}, ValueError, r"draws.tau must lie in \[0, tau_max = 4.0\], got -1"),
        ({"draws": Draws(tau=torch.tensor(5.0))}, ValueError, r"draws.tau must lie in \[0, tau_max = 4.0\]"),
        ({"draws": Draws(tau=torch.ones(6))}, ValueError, r"draws.tau must be one number, got shape \[6\]"),
        ({"draws": Draws(tau=1.0)}, TypeError, "draws.tau must be a torch.Tensor, got float"),
        ({"draws": Draws(probe=X * torch.nan)}, ValueError, "draws.probe must be finite"),
        ({"draws": {"tau": 1.0}}, TypeError, "draws must be a Draws, got {'tau': 1.0}"),
        ({"draws": ()}, TypeError, "draws must be a Draws, got"),
        ({"horizon": "uniform"}, TypeError, "horizon must be a Horizon, got 'uniform'"),
        ({"horizon": UniformHorizon}, TypeError, "horizon must be a Horizon, got <class"),
        ({"refs": torch.randn(9, 2, 1)}, ValueError, r"refs must have shape \[M, \*event\]"),
        ({"x": X.bfloat16()}, TypeError, "x must be float32 or float64, got torch.bfloat16.* use torch.autocast"),
        (
            {"field": lambda z: z[:, :1]},
            ValueError,
            r"field must return the shape of its input, \[12, 2\], got \[12, 1\]",  # both sides of a difference at once
        ),
        ({"field": lambda z: 0.0}, TypeError, "field must return a torch.Tensor, got float"),
        (
            {"field": lambda z, sigma: z},
            TypeError,
            r"field is called with one argument, x; .* take fields of two \(.*\)",
        ),
    ],
)
def test_bad_argument(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        loss(**options)


SPARSE, NESTED = X.to_sparse(), torch.nested.nested_tensor([X, X[:3]])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"x": SPARSE}, "flux_matching_loss: x must be a dense tensor, got layout sparse_coo"),
        ({"x": X.to_mkldnn()}, "flux_matching_loss: x must be a dense tensor, got layout _mkldnn"),
        ({"x": NESTED}, "flux_matching_loss: x must be a dense tensor, got a nested tensor"),
        ({"x": X.to(torch.complex64)}, "flux_matching_loss: x must have a floating dtype, got torch.complex64"),
        ({"x": X.long()}, "flux_matching_loss: x must have a floating dtype, got torch.int64"),
        ({"refs": SPARSE}, "flux_matching_loss: refs must be a dense tensor"),
        ({"sigma": torch.tensor(0.5).to_sparse()}, "flux_matching_loss: sigma must be a dense tensor"),
        ({"draws": Draws(tau=torch.tensor(0.5).to_sparse())}, "flux_matching_loss: draws.tau must be a dense tensor"),
        ({"draws": Draws(start=SPARSE)}, "flux_matching_loss: draws.start must be a dense tensor"),
        ({"draws": Draws(probe=NESTED)}, "flux_matching_loss: draws.probe must be a dense tensor"),
        (
            {"draws": Draws(endpoints=torch.tensor([1, 2]).to_sparse())},
            "flux_matching_loss: draws.endpoints must be a dense tensor",
        ),
        ({"field": lambda z: z.to_sparse()}, "field: its result must be a dense tensor, got layout sparse_coo"),
        (
            {"field": lambda z: torch.nested.nested_tensor([z, z])},
            "field: its result must be a dense tensor, got a",
        ),
    ],
)
def test_unusual_tensors(options: dict[str, Any], text: str) -> None:
    for method in ("double_backward", "finite_difference"):
        with pytest.raises(TypeError, match=text):
            loss(**options, second_derivatives=method)


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        expected = loss(net, seed=1)
    assert expected.isfinite().all()
    for method in ("double_backward", "forward_over_reverse", "finite_difference"):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
            loss(net, second_derivatives=method)


class FirstDerivativeOnly(torch.autograd.Function):
    """tanh in the old style, which torch.func cannot transform."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


def test_a_field_without_second_derivatives_is_told_the_way_out() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    fields = {
        "double_backward": torch.compile(net, backend="aot_eager"),
        "forward_over_reverse": lambda z: FirstDerivativeOnly.apply(z),
    }
    for method, field in fields.items():
        with pytest.raises(RuntimeError, match="second_derivatives='finite_difference' needs first derivatives only"):
            loss(field, second_derivatives=method)
        assert loss(field, second_derivatives="finite_difference").isfinite().all()


def test_a_field_may_write_to_its_input() -> None:
    before = X.clone()
    expected = loss(lambda z: 2 * z, seed=1)
    torch.testing.assert_close(loss(lambda z: z.detach().clone().mul_(0) + 2 * z, seed=1), expected)
    target = target_of(lambda z: -z, X, 0.7, seed=1, backend="torch")
    x0 = target.x0.clone()
    target.loss(lambda z: z.mul_(2))
    assert torch.equal(target.x0, x0)
    assert torch.equal(X, before)


WEIGHT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("second_derivatives", ["double_backward", "forward_over_reverse", "finite_difference"])
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
def test_fields_without_second_derivatives(field: Any, second_derivatives: str) -> None:
    """A field may be linear, or not look at z at all: its derivatives are zeros, not errors."""
    assert loss(field, second_derivatives=second_derivatives, seed=1).isfinite().all()


def test_one_sample_is_its_own_reference_point() -> None:
    assert loss(x=X[:1], second_derivatives="finite_difference").shape == (1,)


def test_horizon_zero_is_a_limit() -> None:
    a = loss(draws=Draws(tau=torch.tensor(0.0)), seed=1)
    b = loss(draws=Draws(tau=torch.tensor(1e-10)), seed=1)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_horizon_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tau_max must be a positive number, got 0"):
        UniformHorizon(0)


@pytest.mark.parametrize("variance", [1e-3, 0.05, 0.1, 0.5])
def test_square_of_a_square_root_is_exact_in_float32(variance: float) -> None:
    """σ given as a number is squared in double precision, so math.sqrt(σ²) stands for σ² to the last bit."""
    _, squared = as_sigma("test", math.sqrt(variance), like=X)
    assert squared.item() == torch.tensor(variance).item()
    level, squared = as_sigma("test", torch.tensor(0.3), like=X)
    assert torch.equal(level, torch.tensor(0.3))
    assert torch.equal(squared, torch.tensor(0.3).square())
